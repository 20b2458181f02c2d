"""The forms in which texts and ids come in and go out."""

from __future__ import annotations

from array import array
from itertools import groupby
from typing import TYPE_CHECKING

from tokenizer.errors import TokenizerError

if TYPE_CHECKING:
    import numpy as np


def checked_text(text: object, caller: str) -> str:
    """The text, if it is a str."""
    if not isinstance(text, str):
        raise TokenizerError(f"{caller} takes str, not {type(text).__name__}")
    return text


def run_lengths(ids: list[int]) -> list[tuple[int, int]]:
    """[(id, how often in a row)]."""
    return [(id_, sum(1 for _ in group)) for id_, group in groupby(ids)]


MANY = 256
"""Ids from which on NumPy decodes faster than plain Python."""


def flat_ids(ids: object) -> list[int] | np.ndarray:
    """Ids in any of the accepted forms: a list where there are few, else an int array [T]."""
    try:
        if not hasattr(ids, "dtype"):
            ids = ids if isinstance(ids, list | tuple) else list(ids)  # type: ignore[call-overload]
            if ids and hasattr(ids[0], "__len__"):
                if any(count < 1 for _, count in ids):
                    raise ValueError
                ids = [id_ for id_, count in ids for _ in range(count)]
            if len(ids) < MANY:
                return array("i", ids).tolist()
            import numpy as np

            try:  # "I" is by far the fastest way from a list to numbers, and knows no negative ones
                return np.frombuffer(array("I", ids), dtype=np.uint32)
            except OverflowError:
                return np.frombuffer(array("i", ids), dtype=np.int32)
        import numpy as np

        values = np.asarray(ids)
        if values.ndim == 2 and values.shape[1] == 2:
            values = np.repeat(values[:, 0], values[:, 1])
        if values.size and (values.ndim != 1 or values.dtype.kind not in "iu"):
            raise TypeError
        return values if values.size >= MANY else [int(id_) for id_ in values]
    except (TypeError, ValueError, OverflowError):
        raise TokenizerError("decode takes ids (list[int] or an int array [T]) or (id, count) pairs") from None
