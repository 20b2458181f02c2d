"""Axes: where the ticks are, what stands at them, and how figures are written."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slm_jax.utils.formatting import duration

_UNITS = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # from here on, divided by, written
_TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400]  # seconds


@dataclass(frozen=True)
class Scale:
    """A stretch of numbers laid on 0..1, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: np.ndarray, log: bool = False, zero: bool = False) -> "Scale | None":
        """The stretch that holds all finite values (log: the positive ones) with a margin; None where there are none.

        zero: begin at 0.
        """
        values = values[np.isfinite(values) & (values > 0 if log else True)]
        if not values.size:
            return None
        low, high = float(values.min()), float(values.max())
        if log:
            margin = max(high / low, 1.02) ** 0.04
            return cls(low / margin, high * margin, True)
        low = min(low, 0.0) if zero else low
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low if zero and low == 0 else low - margin, high + margin)

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where values lie, 0 at the low end and 1 at the high; NaN for what has no place."""
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.log:
                places = np.log(values / self.low) / math.log(self.high / self.low)
            else:
                places = (values - self.low) / (self.high - self.low)
        return np.where(np.isfinite(places), places, np.nan)

    def ticks(self, count: int = 5) -> list[float]:
        """About so many round numbers."""
        if self.log:
            return _log_ticks(self.low, self.high, count)
        return multiples(self.low, self.high, round_step((self.high - self.low) / count))


def round_step(wanted: float) -> float:
    """That of 1, 2, 5 x 10^k whose ratio to `wanted` is nearest to 1."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return min((step * power for step in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / wanted)))


def time_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round durations, in seconds."""
    least = (high - low) / count
    step = next((step for step in _TIMES if step >= least), None)
    return multiples(low, high, float(step) if step and least >= 1 else round_step(least))


def multiples(low: float, high: float, step: float) -> list[float]:
    """The multiples of step from low to high."""
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    decades = math.log10(high / low)
    if decades < 0.7:  # round numbers, as on a linear axis
        return multiples(low, high, round_step((high - low) / count))
    factors = (1, 2, 5) if decades < 3 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil(len(powers) / 7))
    ticks = [factor * 10.0**power for power in powers if power % every == 0 for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def compact(value: float) -> str:
    """1.2k, 3.4M, 0.012: three digits at most."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1e15:
        return f"{value:.2e}"
    for limit, size, unit in _UNITS:
        if abs(value) >= limit:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}"


def tick_texts(ticks: list[float], form: Callable[[float], str] | None = None) -> list[str]:
    """Texts with as many decimals as tell the ticks apart."""
    if form is not None:
        return [form(tick) for tick in ticks]
    most = max(map(abs, ticks), default=0.0)
    if most >= 1e15 or 0 < most < 1e-3:
        mantissas = [tick / 10.0 ** math.floor(math.log10(abs(tick))) for tick in ticks if tick]
        return [f"{tick:.{_digits(mantissas)}e}" if tick else "0" for tick in ticks]
    size, unit = next(((size, unit) for limit, size, unit in _UNITS if most >= limit), (1.0, ""))
    decimals = _digits([tick / size for tick in ticks])
    return [f"{tick / size:,.{decimals}f}{unit}" if tick else "0" for tick in ticks]


def _digits(values: list[float]) -> int:
    """Decimals that these round numbers have."""
    return next((d for d in range(7) if all(abs(round(v, d) - v) < 1e-9 * max(1.0, abs(v)) for v in values)), 6)


def percent(value: float) -> str:
    """A share as 12.3 %."""
    return f"{100 * value:.1f}\u00a0%" if abs(value) >= 0.001 or value == 0 else f"{100 * value:.2g}\u00a0%"


def percent_tick(value: float) -> str:
    """A round share as 12 %."""
    return f"{100 * value:.3g}\u00a0%"


def span(seconds: float) -> str:
    """A duration: 45 s, 3:07, 1:02:11, 3 d 4:05:00."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    days, rest = divmod(seconds, 86400)
    return f"{days:.0f} d {duration(rest)}" if days else duration(seconds)


def figure(value: float, digits: int = 4) -> str:
    """A number to so many digits, grouped by thousands; large and tiny ones in powers of ten."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.{digits - 1}e}"
    return f"{value:#.{digits}g}".rstrip(".") if abs(value) >= 1e-4 else f"{value:.{digits - 1}e}"
