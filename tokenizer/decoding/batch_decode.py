"""Ids to bytes for many ids at once, with NumPy: equal to `Decoder.to_bytes`.

Every token's first sixteen bytes are written as one number at the token's place, in order, so that what is
written beyond a short token is overwritten by the next one. Longer tokens get further sixteens, the last one
ending where the token ends. A case mark is taken into account by looking the next id up in a second or third table.
"""

from __future__ import annotations

import numpy as np

from tokenizer.units import text_to_bytes
from tokenizer.vocabulary import Vocabulary

_WORD = 16
_WIDE = np.dtype(f"V{_WORD}")
_CHUNK = 1 << 15
"""Ids that are decoded at once: more would leave the processor's cache."""


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
        self._heads = np.frombuffer(b"".join([token[:_WORD].ljust(_WORD, b"\0") for token in data]), dtype=_WIDE)
        long = [token for token in data if len(token) > _WORD]
        # The words after the first: number k of token t is at _first_tail[t] + k, begins at min(16 (k + 1), size - 16).
        tails = [token[at : at + _WORD] for token in long for at in _tail_offsets(len(token))]
        self._tails = np.frombuffer(b"".join(tails), dtype=_WIDE)
        self._tail_counts = np.maximum(0, (lengths + _WORD - 1) // _WORD - 1)
        self._first_tail = np.cumsum(self._tail_counts) - self._tail_counts

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes of ids (int [T], each from 0 to size - 1)."""
        parts, start = [], 0
        while start < len(ids):
            stop = start + _CHUNK
            while stop < len(ids) and ids[stop - 1] in (self._up, self._caps):  # a mark stays with what it marks
                stop += 1
            parts.append(self._decode_chunk(ids[start:stop]))
            start = stop
        return b"".join(parts)

    def _decode_chunk(self, ids: np.ndarray) -> memoryview:
        ids = ids.astype(np.int64)
        if self._up >= 0:
            marks = ids[:-1] - self._up
            places = np.flatnonzero(marks.view(np.uint64) < 2)
            ids[places + 1] += self.size * (1 + marks[places])
        # "clip" because it is the fastest mode: every id is inside.
        lengths = self._lengths.take(ids, mode="clip")
        ends = np.cumsum(lengths)
        starts = ends - lengths
        total = int(ends[-1]) if len(ends) else 0
        out = np.empty(total + _WORD, dtype=np.uint8)
        words = np.ndarray(total + 1, dtype=_WIDE, buffer=out.data, strides=(1,))
        words[starts] = self._heads.take(ids, mode="clip")
        long = np.flatnonzero(lengths > _WORD)
        chunk = 0
        while len(long):
            token = ids[long]
            offsets = np.minimum(_WORD * (chunk + 1), lengths[long] - _WORD)
            words[starts[long] + offsets] = self._tails[self._first_tail[token] + chunk]
            chunk += 1
            long = long[self._tail_counts[token] > chunk]
        return out[:total].data


def _tail_offsets(size: int) -> list[int]:
    return [min(_WORD * chunk, size - _WORD) for chunk in range(1, (size + _WORD - 1) // _WORD)]
