"""Merge the bytes of many pre-tokens at once: `tokenizer.portable.reference.merge_bytes`, vectorized with NumPy.

In each round, every word applies the best of its merges everywhere it can. This is exact: a merge only makes pairs that
were learned later, so the other places of the same merge come next anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokenizer.vocabulary import FIRST_BYTE, Vocabulary

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
_NO_KEY = np.uint64(2**64 - 1)
NO_MERGE = np.int32(2**31 - 1)
_NO_ID = np.int32(-1)
"""In place of an id: there is a word's border."""
_CHANGED = np.int32(-2)
"""In place of a merge: one of the two ids is new."""


class PairTable:
    """A hash table from pairs of ids to the id of their merge, with linear probing; one slot in eight is used."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        pairs = np.array(vocabulary.merges, dtype=np.uint64).reshape(-1, 2)
        keys = pairs[:, 0] << np.uint64(32) | pairs[:, 1]
        bits = max(4, (4 * len(keys)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._keys = np.full(1 << bits, _NO_KEY)
        self._ids = np.full(1 << bits, NO_MERGE, dtype=np.int32)
        self._last_slot = (1 << bits) - 1
        slots = self._slots(keys)
        pending = np.arange(len(keys))
        while len(pending):  # where several claim a slot, one of them is in it afterwards
            free = pending[self._keys[slots[pending]] == _NO_KEY]
            self._keys[slots[free]] = keys[free]
            pending = pending[self._keys[slots[pending]] != keys[pending]]
            slots[pending] = slots[pending] + 1 & self._last_slot
        self._ids[slots] = vocabulary.first_merge + np.arange(len(keys))
        bytes_ = np.arange(FIRST_BYTE, FIRST_BYTE + 256, dtype=np.int32)
        self._ids_of_bytes = self.find(np.repeat(bytes_, 256), np.tile(bytes_, 256))

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        return ((keys * _GOLDEN_RATIO) >> self._shift).view(np.int64)

    def find_bytes(self, data: np.ndarray) -> np.ndarray:
        """Return the id of the merge of each byte (uint8 [n]) and the next one, int32 [n]; the last is arbitrary."""
        pairs = data.astype(np.int64) << 8
        pairs[:-1] |= data[1:]
        return self._ids_of_bytes.take(pairs)

    def find(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the id of the merge of each pair (int32 [n] each), `NO_MERGE` where there is none."""
        keys = left.astype(np.uint64) << np.uint64(32) | right.astype(np.uint64)
        slots = self._slots(keys)
        stored = self._keys.take(slots)
        result = self._ids.take(slots)
        pending = np.flatnonzero(stored != keys)
        result[pending] = NO_MERGE
        pending = pending[stored[pending] != _NO_KEY]
        while len(pending):
            slots[pending] = slots[pending] + 1 & self._last_slot
            stored = self._keys[slots[pending]]
            hit = stored == keys[pending]
            result[pending[hit]] = self._ids[slots[pending[hit]]]
            pending = pending[~hit & (stored != _NO_KEY)]
        return result


class BatchMerger:
    """Merges the bytes of lists of words with one vocabulary. Immutable after construction, hence safe to share."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._table = PairTable(vocabulary)
        self._size = vocabulary.size

    def merge(self, words: list[bytes]) -> list[bytes]:
        """Return the ids that merges make of each word, as the bytes of an int32 array; no word may be empty."""
        results = [b""] * len(words)
        for members, ids, lengths in self._rounds(words):
            data = ids.tobytes()
            start = 0
            for member, end in zip(members.tolist(), (4 * np.cumsum(lengths)).tolist(), strict=True):
                results[member] = data[start:end]
                start = end
        return results

    def usage(self, words: list[bytes], weights: np.ndarray) -> np.ndarray:
        """Return how often each id is used (int64 [V]) if word i occurs `weights[i]` times (int64 [n])."""
        used = np.zeros(self._size, dtype=np.float64)
        for members, ids, lengths in self._rounds(words):
            used += np.bincount(ids, weights=np.repeat(weights[members], lengths), minlength=self._size)
        return used.astype(np.int64)

    def _rounds(self, words: list[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (indices of words that are done, their concatenated ids, number of ids of each)."""
        members = np.arange(len(words))
        # `_NO_ID` is before, between and after the words, so that every id has two neighbors.
        data = np.frombuffer(b"\0".join([b"", *words, b""]), dtype=np.uint8)
        ids = data + np.int32(FIRST_BYTE)
        borders = np.cumsum([0, *[len(word) + 1 for word in words]])
        ids[borders] = _NO_ID
        merged = self._table.find_bytes(data)  # of each item and the next one
        merged[borders] = NO_MERGE
        merged[borders[1:] - 1] = NO_MERGE
        while len(members):
            sizes = np.diff(borders)  # with the item after each word
            best = np.minimum.reduceat(merged, borders[:-1] + 1)
            done = best == NO_MERGE
            best[done] = _NO_ID
            kept = np.ones(len(ids), dtype=bool)
            if done.any():
                is_done = np.repeat(done, sizes)
                ids_done = ids[1:][is_done]
                yield members[done], ids_done[ids_done != _NO_ID], sizes[done] - 1
                members = members[~done]
                np.logical_not(is_done, out=kept[1:])
            positions = _without_overlaps(1 + np.flatnonzero(merged[1:] == np.repeat(best, sizes)))
            ids[positions] = merged[positions]
            merged[positions] = _CHANGED
            kept[positions + 1] = False
            kept_at = np.flatnonzero(kept)
            ids = ids.take(kept_at)
            merged = merged.take(kept_at)
            borders = np.flatnonzero(ids == _NO_ID)
            positions = np.flatnonzero(merged == _CHANGED)
            changed = np.concatenate((positions - 1, positions))
            merged[changed] = self._table.find(ids.take(changed), ids.take(changed + 1))


def _without_overlaps(positions: np.ndarray) -> np.ndarray:
    """Of adjacent positions, keep every second one from the left: "aaa" has one pair of the two that overlap."""
    adjacent = np.diff(positions, prepend=-2) == 1
    if not adjacent.any():
        return positions
    index = np.arange(len(positions))
    run_start = np.maximum.accumulate(np.where(adjacent, 0, index))
    return positions[(index - run_start) % 2 == 0]
