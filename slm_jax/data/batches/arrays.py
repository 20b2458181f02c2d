"""Arrays of batches, and circular reads of token streams."""

from collections.abc import Iterator

import numpy as np

from slm_jax.data.corpus.stream import TokenStream
from slm_jax.utils.batch import IGNORE_INDEX, Arrays

Tokens = TokenStream | np.ndarray  # token ids [N]; every token of an array is predicted


def empty_arrays(*shape: int) -> Arrays:
    """Return input_ids and labels without content, int32 [shape]: nothing to read and nothing to predict."""
    return {"input_ids": np.zeros(shape, np.int32), "labels": np.full(shape, IGNORE_INDEX, np.int32)}


def row(batch: Arrays, index: int) -> Arrays:
    """Return views of one row of a batch."""
    return {name: array[index] for name, array in batch.items()}


def read_circular(tokens: Tokens, start: int, count: int) -> np.ndarray:
    """Return `count` token ids of a stream [N] from `start` (modulo N) on; the end is followed by the beginning."""
    n = len(tokens)
    start %= n
    if start + count <= n:
        return tokens[start : start + count]
    return np.concatenate([tokens[start:n], tokens[0 : start + count - n]])


def circular_segments(n: int, start: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the one or two segments of a stream [n] that a circular read covers."""
    start %= n
    yield start, min(n, start + count)
    if start + count > n:
        yield 0, start + count - n
