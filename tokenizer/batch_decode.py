"""Ids to bytes for many ids at once, with NumPy: equal to `Decoder.to_bytes`.

Every token's first eight bytes are written as one 64-bit number at the token's place, in order, so that what is
written beyond a short token is overwritten by the next one. Longer tokens get further eights, the last one
ending where the token ends. A case mark is taken into account by looking the next id up in a second or third table.
"""

from __future__ import annotations

import numpy as np

from tokenizer.units import text_to_bytes
from tokenizer.vocabulary import Vocabulary


class BatchDecoder:
    """Decodes int arrays with one table of bytes, which holds nothing that changes."""

    def __init__(self, vocabulary: Vocabulary, table: list[bytes]) -> None:
        self.size = vocabulary.size
        self._up, self._caps = vocabulary.up, vocabulary.caps
        data = list(table)
        if vocabulary.lowercase:
            texts = vocabulary.texts
            ups = [text_to_bytes(text) for text in vocabulary.capitalised_texts]
            caps = [text_to_bytes(text) for text in vocabulary.upper_texts]
            for marked in (ups, caps):
                data += [own if text else plain for own, text, plain in zip(marked, texts, table, strict=True)]
        lengths = np.array([len(token) for token in data], dtype=np.int64)
        self._lengths = lengths
        self._heads = np.frombuffer(b"".join([token[:8].ljust(8, b"\0") for token in data]), dtype=np.uint64)
        long = [token for token in data if len(token) > 8]
        # The eights after the first: chunk k of token t is at _first_tail[t] + k, begins at min(8 (k + 1), size - 8).
        tails = [token[at : at + 8] for token in long for at in _tail_offsets(len(token))]
        self._tails = np.frombuffer(b"".join(tails), dtype=np.uint64)
        self._tail_counts = np.maximum(0, (lengths + 7) // 8 - 1)
        self._first_tail = np.cumsum(self._tail_counts) - self._tail_counts

    def decode(self, ids: np.ndarray) -> memoryview:
        """The bytes of ids (int [T], each from 0 to size - 1)."""
        if self._up >= 0:
            ups, capses = ids[:-1] == self._up, ids[:-1] == self._caps
            ids = ids.astype(np.int64)
            if ups.any():
                ids[1:] += ups * self.size
            if capses.any():
                ids[1:] += capses * (2 * self.size)
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        total = int(ends[-1]) if len(ends) else 0
        out = np.empty(total + 8, dtype=np.uint8)
        eights = np.lib.stride_tricks.as_strided(out[:8].view(np.uint64), (total + 1,), (1,))
        eights[starts] = self._heads[ids]
        long = np.flatnonzero(lengths > 8)
        chunk = 0
        while len(long):
            token = ids[long]
            offsets = np.minimum(8 * (chunk + 1), lengths[long] - 8)
            eights[starts[long] + offsets] = self._tails[self._first_tail[token] + chunk]
            chunk += 1
            long = long[self._tail_counts[token] > chunk]
        return out[:total].data


def _tail_offsets(size: int) -> list[int]:
    return [min(8 * chunk, size - 8) for chunk in range(1, (size + 7) // 8)]
