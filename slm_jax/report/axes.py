"""Scales of axes, their ticks and labels, and the formatting of numbers on the page."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slm_jax.utils.formatting import duration

_UNITS = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # from this value on, divisor, suffix
_ROUND_SECONDS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400]


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from the interval low..high to 0..1."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def fit(cls, values: np.ndarray, log: bool = False, include_zero: bool = False) -> "Scale | None":
        """Return a scale that covers all finite values with a margin.

        Args:
            values: The values.
            log: Make a logarithmic scale of the positive values.
            include_zero: Start a linear scale at 0.

        Returns:
            The scale; None if there is no value to cover.
        """
        values = values[np.isfinite(values) & (values > 0 if log else True)]
        if not values.size:
            return None
        low = float(values.min())
        high = float(values.max())
        if log:
            margin = max(high / low, 1.02) ** 0.04
            return cls(low / margin, high * margin, True)
        if include_zero:
            low = min(low, 0.0)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low if include_zero and low == 0 else low - margin, high + margin)

    def position(self, values: np.ndarray) -> np.ndarray:
        """Return the positions of values: 0 at `low`, 1 at `high`, NaN for values without a position."""
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.log:
                positions = np.log(values / self.low) / math.log(self.high / self.low)
            else:
                positions = (values - self.low) / (self.high - self.low)
        return np.where(np.isfinite(positions), positions, np.nan)

    def ticks(self, count: int = 5) -> list[float]:
        """Return about `count` round numbers within the scale."""
        if self.log:
            return _log_ticks(self.low, self.high, count)
        return multiples(self.low, self.high, round_step((self.high - self.low) / count))


def round_step(target: float) -> float:
    """Return the number among 1, 2, 5 x 10^k whose ratio to `target` is closest to 1."""
    power = 10.0 ** math.floor(math.log10(target))
    return min((step * power for step in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / target)))


def time_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round durations in seconds."""
    target = (high - low) / count
    step = next((step for step in _ROUND_SECONDS if step >= target), None)
    return multiples(low, high, float(step) if step and target >= 1 else round_step(target))


def multiples(low: float, high: float, step: float) -> list[float]:
    """Return the multiples of `step` from low to high."""
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    decades = math.log10(high / low)
    if decades < 0.7:  # round numbers as on a linear axis
        return multiples(low, high, round_step((high - low) / count))
    factors = (1, 2, 5) if decades < 3 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil(len(powers) / 7))
    ticks = [factor * 10.0**power for power in powers if power % every == 0 for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def tick_labels(ticks: list[float], format_value: Callable[[float], str] | None = None) -> list[str]:
    """Return labels with as many decimals as are needed to distinguish the ticks."""
    if format_value is not None:
        return [format_value(tick) for tick in ticks]
    largest = max(map(abs, ticks), default=0.0)
    if largest >= 1e15 or 0 < largest < 1e-3:
        mantissas = [tick / 10.0 ** math.floor(math.log10(abs(tick))) for tick in ticks if tick]
        return [f"{tick:.{_num_decimals(mantissas)}e}" if tick else "0" for tick in ticks]
    size, suffix = next(((size, suffix) for limit, size, suffix in _UNITS if largest >= limit), (1.0, ""))
    decimals = _num_decimals([tick / size for tick in ticks])
    return [f"{tick / size:,.{decimals}f}{suffix}" if tick else "0" for tick in ticks]


def _num_decimals(values: list[float]) -> int:
    """Return the number of decimals that write these round numbers exactly, at most 6."""
    for decimals in range(7):
        if all(abs(round(value, decimals) - value) < 1e-9 * max(1.0, abs(value)) for value in values):
            return decimals
    return 6


def format_compact(value: float) -> str:
    """Format a number with at most three digits: 1.2k, 3.4M, 0.012."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1e15:
        return f"{value:.2e}"
    for limit, size, suffix in _UNITS:
        if abs(value) >= limit:
            return f"{value / size:.3g}{suffix}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}"


def format_number(value: float, digits: int = 4) -> str:
    """Format a number with `digits` digits, grouped by thousands; very large and small ones as powers of ten."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.{digits - 1}e}"
    return f"{value:#.{digits}g}".rstrip(".") if abs(value) >= 1e-4 else f"{value:.{digits - 1}e}"


def format_percent(value: float) -> str:
    """Format a fraction as 12.3 %."""
    return f"{100 * value:.1f}\u00a0%" if abs(value) >= 0.001 or value == 0 else f"{100 * value:.2g}\u00a0%"


def format_percent_tick(value: float) -> str:
    """Format a round fraction as 12 %."""
    return f"{100 * value:.3g}\u00a0%"


def format_duration(seconds: float) -> str:
    """Format a duration: 45 s, 3:07, 1:02:11, 3 d 4:05:00."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    days, rest = divmod(seconds, 86400)
    return f"{days:.0f} d {duration(rest)}" if days else duration(seconds)
