"""A problem of several options, and the values that its message suggests."""

from collections.abc import Sequence

Problem = tuple[tuple[str, ...], str]
"""The options that are involved, and the message: what is wrong and what to do."""


def multiples(value: int, step: int) -> list[int]:
    """Return the positive multiples of `step` next to `value`, at most one below and one above."""
    below = value // step * step
    return [n for n in (below, below + step) if n > 0]


def any_of(values: Sequence[int]) -> str:
    """Return the values as text: `96 or 104`."""
    return " or ".join(str(value) for value in values)
