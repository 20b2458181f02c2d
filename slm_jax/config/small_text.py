"""Figures behind `--size auto`: size of the model, number of epochs, what to expect.

The rule itself is in `rule.py`.
"""

import itertools
import math
from typing import NamedTuple

AUTO_PARAMETERS = 2.2e6  # for a text of AUTO_BYTES, the length of Python's documentation
AUTO_BYTES = 2.4e6
AUTO_POWER = 0.3  # 0.9 M parameters on 100 kB, see training_length.AUTO_EPOCHS; larger models were not tried
MIN_AUTO_PARAMETERS = 4e5
AUTO_DROPOUT = 0.1  # where the text is read more than MAX_EPOCHS times
AUTO_STOP_EARLY = 2

# With trained weights to start from (`--base`). On 100 kB of English news, from 1.1 M parameters trained on Python's
# documentation, one seed, bits per byte: rate 0.0025 (half of the rule's) 2.055, 0.0018 2.064, 0.0072 2.097; eight
# epochs of twice the batch at 0.0029 2.071, the best of them the fifth.
TUNED_EPOCHS = 4
TUNED_LR_SCALE = 0.5  # of the rate for random weights


class Point(NamedTuple):
    """A measured run of `--size auto`.

    Attributes:
        text_bytes: UTF-8 bytes of the training text.
        bits_per_byte: Of held-out documents of the same collection.
    """

    text_bytes: int
    bits_per_byte: float


# Seed 0; 80 kB of documents of the same collection are held out. configs/README.md has the whole runs.
POINTS: dict[str, tuple[Point, ...]] = {
    "English news": (Point(100_000, 2.12), Point(300_000, 1.81), Point(1_000_000, 1.64)),
    "pages of technical documentation": (Point(100_000, 1.84), Point(300_000, 1.66)),
    "documentation of several programs": (Point(1_000_000, 1.72),),
}
NEAR = 2.0  # a text counts for sizes up to this factor outside of its measured ones


class ExpectedBits(NamedTuple):
    """Bits per byte that `--size auto` has reached on other texts of a size.

    Attributes:
        low: The lowest of the texts.
        high: The highest.
        source: The texts and the measured size that it is from, in words.
    """

    low: float
    high: float
    source: str


def auto_parameters(text_bytes: int) -> float:
    """Return the parameters that `--size auto` chooses for a text."""
    return max(MIN_AUTO_PARAMETERS, AUTO_PARAMETERS * (text_bytes / AUTO_BYTES) ** AUTO_POWER)


def expected_bits(text_bytes: int) -> ExpectedBits:
    """Return the range of bits per byte for a text, interpolated between measured sizes in the logarithm of the bytes.

    Texts that were measured at much smaller or larger sizes only are left out. Outside the sizes of all texts it is the
    range of the nearest size.

    Args:
        text_bytes: Bytes of the training text.
    """
    sizes = [point.text_bytes for points in POINTS.values() for point in points]
    nearest = min(max(text_bytes, min(sizes)), max(sizes))
    near = {name: points for name, points in POINTS.items() if _is_near(points, nearest)}
    values = {name: _interpolate(points, nearest) for name, points in (near or POINTS).items()}
    named = " and ".join(f"{name} ({value:.2f})" for name, value in values.items())
    note = f", measured at {nearest / 1e3:,.0f} kB, the nearest size" if nearest != text_bytes else ""
    return ExpectedBits(min(values.values()), max(values.values()), f"{named}{note}")


def _is_near(points: tuple[Point, ...], text_bytes: int) -> bool:
    """Return whether a size is among the measured ones of a text, or at most by the factor NEAR outside."""
    return points[0].text_bytes / NEAR <= text_bytes <= points[-1].text_bytes * NEAR


def _interpolate(points: tuple[Point, ...], text_bytes: int) -> float:
    """Return the bits per byte at a size; outside the measured ones that of the nearest."""
    for (below, high), (above, low) in itertools.pairwise(points):
        if text_bytes <= above:
            share = max(math.log(text_bytes / below) / math.log(above / below), 0.0)
            return (1 - share) * high + share * low
    return points[-1].bits_per_byte
