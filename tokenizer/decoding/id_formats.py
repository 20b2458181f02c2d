"""The accepted formats of ids: flat lists, integer arrays and run-length pairs."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from tokenizer.errors import TokenizerError

if TYPE_CHECKING:  # importing NumPy takes longer than loading a saved tokenizer
    import numpy as np
    from numpy.typing import NDArray

    TokenIds = Iterable[int] | Iterable[tuple[int, int]] | NDArray[np.integer]
    """Flat ids, (id, count) pairs, or an integer array [T] or [T, 2]."""

MIN_ARRAY_LENGTH = 256
"""Number of ids from which NumPy decodes faster than plain Python."""


def run_length_encode(ids: list[int]) -> list[tuple[int, int]]:
    """Return [(id, number of consecutive occurrences), …]."""
    return [(id_, sum(1 for _ in group)) for id_, group in groupby(ids)]


def flatten_ids(ids: TokenIds) -> list[int] | np.ndarray:
    """Convert ids in any accepted format to flat ids.

    Returns:
        A list for fewer than `MIN_ARRAY_LENGTH` ids, else an integer array [T].

    Raises:
        TokenizerError: The value has another format, or an id does not fit into 32 bits.
    """
    try:
        if hasattr(ids, "dtype"):
            return _flatten_array(ids)
        return _flatten_iterable(ids)
    except (TypeError, ValueError, OverflowError):
        raise TokenizerError("decode takes ids (list[int] or an int array [T]) or (id, count) pairs") from None


def _flatten_iterable(ids: Iterable) -> list[int] | np.ndarray:
    values = ids if isinstance(ids, list | tuple) else list(ids)
    if values and hasattr(values[0], "__len__"):
        if any(count < 1 for _, count in values):
            raise ValueError
        values = [id_ for id_, count in values for _ in range(count)]
    if len(values) < MIN_ARRAY_LENGTH:
        return array("i", values).tolist()
    import numpy as np

    try:  # "I" is by far the fastest conversion from a list, but has no negative numbers
        return np.frombuffer(array("I", values), dtype=np.uint32)
    except OverflowError:
        return np.frombuffer(array("i", values), dtype=np.int32)


def _flatten_array(ids: object) -> list[int] | np.ndarray:
    import numpy as np

    values = np.asarray(ids)
    if values.ndim == 2 and values.shape[1] == 2:
        values = np.repeat(values[:, 0], values[:, 1])
    if values.size and (values.ndim != 1 or values.dtype.kind not in "iu"):
        raise TypeError
    return values if values.size >= MIN_ARRAY_LENGTH else [int(id_) for id_ in values]
