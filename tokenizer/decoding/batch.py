"""Decode many ids at once with NumPy; equal to `tokenizer.decoding.decoder.Decoder.to_bytes`.

The first 16 bytes of every token are written as one item at the token's position, in order, so that whatever is written
past the end of a short token is overwritten by the next one. Longer tokens get further items of 16 bytes, of which the
last one ends where the token ends. A case mark is applied by looking the next id up in a second or third table.
"""

from __future__ import annotations

import numpy as np

from tokenizer.encoding.unicode import text_to_bytes
from tokenizer.vocabulary import Vocabulary

_ITEM = 16
_ITEM_DTYPE = np.dtype(f"V{_ITEM}")
_CHUNK = 1 << 15
"""Ids that are decoded at once; more would not fit into the processor's cache."""


class BatchDecoder:
    """Decodes integer arrays with one table of bytes. Immutable after construction, hence safe to share.

    Args:
        vocabulary: The vocabulary of the ids.
        table: Bytes of each id without a case mark before it, [V].
    """

    def __init__(self, vocabulary: Vocabulary, table: list[bytes]) -> None:
        self.size = vocabulary.size
        self._up = vocabulary.up
        self._caps = vocabulary.caps
        data = list(table)
        if vocabulary.lowercase:
            # Three tables, one after another: plain, after <UP>, after <CAPS>.
            for texts in (vocabulary.capitalized_texts, vocabulary.upper_texts):
                data += [
                    text_to_bytes(marked) if plain else unmarked
                    for marked, plain, unmarked in zip(texts, vocabulary.texts, table, strict=True)
                ]
        lengths = np.array([len(token) for token in data], dtype=np.int64)
        self._lengths = lengths
        self._heads = np.frombuffer(b"".join([token[:_ITEM].ljust(_ITEM, b"\0") for token in data]), dtype=_ITEM_DTYPE)
        long = [token for token in data if len(token) > _ITEM]
        # Items after the first: number k of token t is _tails[_first_tail[t] + k], at min(16 (k + 1), size - 16).
        tails = [token[offset : offset + _ITEM] for token in long for offset in _tail_offsets(len(token))]
        self._tails = np.frombuffer(b"".join(tails), dtype=_ITEM_DTYPE)
        self._tail_counts = np.maximum(0, (lengths + _ITEM - 1) // _ITEM - 1)
        self._first_tail = np.cumsum(self._tail_counts) - self._tail_counts

    def decode(self, ids: np.ndarray) -> bytes:
        """Return the bytes of ids (int [T], each from 0 to V - 1)."""
        parts = []
        start = 0
        while start < len(ids):
            stop = start + _CHUNK
            while stop < len(ids) and ids[stop - 1] in (self._up, self._caps):  # keep a mark with its token
                stop += 1
            parts.append(self._decode_chunk(ids[start:stop]))
            start = stop
        return b"".join(parts)

    def _decode_chunk(self, ids: np.ndarray) -> memoryview:
        ids = ids.astype(np.int64)
        if self._up >= 0:
            marks = ids[:-1] - self._up
            positions = np.flatnonzero(marks.view(np.uint64) < 2)  # unsigned: ids below <UP> become huge
            ids[positions + 1] += self.size * (1 + marks[positions])
        # mode="clip" because it is the fastest: every id is in range.
        lengths = self._lengths.take(ids, mode="clip")
        ends = np.cumsum(lengths)
        starts = ends - lengths
        total = int(ends[-1]) if len(ends) else 0
        out = np.empty(total + _ITEM, dtype=np.uint8)
        # A view with an item at every byte offset: items overlap.
        items = np.ndarray(total + 1, dtype=_ITEM_DTYPE, buffer=out.data, strides=(1,))
        items[starts] = self._heads.take(ids, mode="clip")
        long = np.flatnonzero(lengths > _ITEM)
        tail = 0
        while len(long):
            token = ids[long]
            offsets = np.minimum(_ITEM * (tail + 1), lengths[long] - _ITEM)
            items[starts[long] + offsets] = self._tails[self._first_tail[token] + tail]
            tail += 1
            long = long[self._tail_counts[token] > tail]
        return out[:total].data


def _tail_offsets(size: int) -> list[int]:
    return [min(_ITEM * index, size - _ITEM) for index in range(1, (size + _ITEM - 1) // _ITEM)]
