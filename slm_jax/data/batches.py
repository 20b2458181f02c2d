"""Batches as a function of position: `at(step)` is the same array whatever happened before."""

import hashlib
from collections.abc import Iterator

import grain
import numpy as np

from slm_jax.batch import IGNORE
from slm_jax.errors import UserError

Arrays = dict[str, np.ndarray]


def window(tokens: np.ndarray, offset: int, index: int, length: int) -> Arrays:
    """Window `index` of the token stream [N], read in a circle from `offset`: input_ids and labels int32 [length].

    The windows 0..ceil(N / length)-1 predict every token exactly once: labels[t] is a token of the stream, and
    input_ids[t] the one before it. The last window is filled up with IGNORE labels. Before the first document comes
    the <EOS> of the last.
    """
    n = len(tokens)
    count = min(length, n - index * length)
    at = (offset + index * length - 1 + np.arange(count + 1)) % n
    stream = tokens[at].astype(np.int32)
    input_ids = np.zeros(length, np.int32)
    labels = np.full(length, IGNORE, np.int32)
    input_ids[:count], labels[:count] = stream[:-1], stream[1:]
    return {"input_ids": input_ids, "labels": labels}


class Batches:
    """Endless shuffled batches [B, T] of a token stream; every token is a target once per epoch.

    Each epoch visits the windows in a new order and cuts them at a new offset, so that contexts differ.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, length: int, seed: int):
        """Raises UserError when the stream does not fill one batch."""
        if len(tokens) < batch_size * length:
            raise UserError(
                f"the training text has {len(tokens):,} tokens, but one batch takes {batch_size} x {length} = "
                f"{batch_size * length:,}: add text, or lower --train.batch_size or --train.sequence_length"
            )
        self.windows = -(-len(tokens) // length)
        self._tokens, self._length, self._seed = tokens, length, seed
        order = grain.MapDataset.range(self.windows).seed(seed).shuffle().repeat()
        self._dataset = order.map_with_index(self._window).batch(batch_size)

    def _window(self, index: int, window_index: int) -> Arrays:
        return window(self._tokens, self._offset(index // self.windows), int(window_index), self._length)

    def _offset(self, epoch: int) -> int:
        digest = hashlib.sha256(f"{self._seed} {epoch}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % len(self._tokens)

    def at(self, step: int) -> Arrays:
        """The batch of optimizer step `step` (from 0): input_ids and labels int32 [B, T]."""
        return self._dataset[step]


def in_order(tokens: np.ndarray, batch_size: int, length: int) -> Iterator[Arrays]:
    """Batches [B, T] that predict every token once, in order; the last is filled up with IGNORE labels."""
    windows = -(-len(tokens) // length)
    blank = {"input_ids": np.zeros(length, np.int32), "labels": np.full(length, IGNORE, np.int32)}
    for start in range(0, windows, batch_size):
        rows = [window(tokens, 0, i, length) if i < windows else blank for i in range(start, start + batch_size)]
        yield {name: np.stack([row[name] for row in rows]) for name in blank}
