"""Numbers with suffixes, and the values of `--size` and `--budget`, as text and as numbers."""

import math
import re
from dataclasses import dataclass

from slm_jax.utils.errors import UserError

AUTO = "auto"  # the size that a text is enough for
_SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_NUMBER = r"(\d+(?:[_,]\d+)*\.?\d*(?:e[+-]?\d+)?|\.\d+)"
_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_TIMES = {
    **_SECONDS,
    "second": 1.0,
    "seconds": 1.0,
    "minute": 60.0,
    "minutes": 60.0,
    "hour": 3600.0,
    "hours": 3600.0,
    "day": 86_400.0,
    "days": 86_400.0,
}
_MIN_FLOPS = 1e6  # a smaller number without a unit is a forgotten unit


@dataclass(frozen=True)
class Budget:
    """A budget for training; exactly one field is not 0.

    Attributes:
        seconds: Time on this machine.
        flops: Model FLOPs.
        tokens: Training tokens.
    """

    seconds: float = 0
    flops: float = 0
    tokens: float = 0


def parse_number(text: str) -> float:
    """Return a positive number, also with a suffix: `300k`, `2.5m`, `1B`, `3T`, `1e13`, `125_000_000`; else 0."""
    match = re.fullmatch(rf"{_NUMBER} ?([kmbgt]?)", text.strip().lower())
    value = _number(match[1]) * _SUFFIXES[match[2]] if match else 0.0
    return value if value < math.inf else 0.0


def parse_size(text: str) -> float:
    """Return a number of parameters: `10M`, `2.5m`, `1B`, `125_000_000`.

    Raises:
        UserError: The text is no such number.
    """
    value = parse_number(text)
    if not value:
        raise UserError(f"--size {text}: should be a number of parameters, such as 10M, 2.5M or 1B, or {AUTO}")
    return value


def parse_budget(text: str) -> Budget:
    """Return a budget: a time (`10min`, `2h`), FLOPs (`1e18`, `1e18 FLOPs`) or tokens (`2B tokens`).

    Raises:
        UserError: The text is none of these.
    """
    match = re.fullmatch(rf"{_NUMBER} ?([a-z ]*)", text.strip().lower())
    value = _number(match[1]) if match else 0.0
    unit = match[2].strip() if match else ""
    if not math.isfinite(value):
        value = 0.0
    if value and unit in _TIMES:
        return Budget(seconds=value * _TIMES[unit])
    if value and (unit in ("flop", "flops") or (not unit and value >= _MIN_FLOPS)):
        return Budget(flops=value)
    tokens = re.fullmatch(r"([kmbgt]?) ?tokens?", unit)
    if value and tokens:
        return Budget(tokens=value * _SUFFIXES[tokens[1]])
    raise UserError(
        f"--budget {text}: should be a time on this machine (10min, 2h), FLOPs (1e18) or tokens ('2B tokens')"
    )


def _number(text: str) -> float:
    return float(text.replace("_", "").replace(",", ""))
