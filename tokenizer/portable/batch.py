"""Merge the bytes of many pre-tokens at once: `tokenizer.portable.reference.merge_bytes`, vectorized with NumPy.

In each round, every word applies the best of its merges everywhere it can. This is exact: a merge only makes pairs that
were learned later, so the other places of the same merge come next anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokenizer.vocabulary import FIRST_BYTE, Vocabulary

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
NO_MERGE = np.int32(2**31 - 1)


class PairTable:
    """A hash table from pairs of ids to the id of their merge: pairs sorted by bucket, and the start of each bucket."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        pairs = np.array(vocabulary.merges, dtype=np.uint64).reshape(-1, 2)
        keys = pairs[:, 0] << np.uint64(32) | pairs[:, 1]
        bits = max(4, (4 * len(keys)).bit_length())
        self._shift = np.uint64(64 - bits)
        buckets = self._bucket(keys)
        order = np.argsort(buckets, kind="stable")
        self._starts = np.searchsorted(buckets[order], np.arange((1 << bits) + 1)).astype(np.int32)
        self._keys = keys[order]
        self._ids = (vocabulary.first_merge + order).astype(np.int32)

    def _bucket(self, keys: np.ndarray) -> np.ndarray:
        return ((keys * _GOLDEN_RATIO) >> self._shift).astype(np.int64)

    def find(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the id of the merge of each pair (int32 [n] each), `NO_MERGE` where there is none."""
        keys = left.astype(np.uint64) << np.uint64(32) | right.astype(np.uint64)
        buckets = self._bucket(keys)
        result = np.full(len(keys), NO_MERGE, dtype=np.int32)
        position = self._starts[buckets]
        stop = self._starts[buckets + 1]
        pending = np.flatnonzero(position < stop)
        while len(pending):
            at = position[pending]
            hit = self._keys[at] == keys[pending]
            result[pending[hit]] = self._ids[at[hit]]
            pending = pending[~hit]
            position[pending] += 1
            pending = pending[position[pending] < stop[pending]]
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
        lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        ids = np.frombuffer(b"".join(words), dtype=np.uint8).astype(np.int32) + np.int32(FIRST_BYTE)
        word = np.repeat(np.arange(len(words)), lengths)
        merged = np.full(len(ids), NO_MERGE, dtype=np.int32)
        self._look_up(merged, np.arange(len(ids) - 1), ids, word)
        while len(ids):
            starts = np.flatnonzero(np.diff(word, prepend=-1))
            best = np.minimum.reduceat(merged, starts)
            lengths = np.diff(starts, append=len(ids))
            done = best == NO_MERGE
            if done.any():
                is_done = np.repeat(done, lengths)
                yield word[starts[done]], ids[is_done], lengths[done]
                kept = ~is_done
                ids = ids[kept]
                word = word[kept]
                merged = merged[kept]
                best = best[~done]
                lengths = lengths[~done]
                if not len(ids):
                    return
            positions = np.flatnonzero(merged == np.repeat(best, lengths))
            positions = _without_overlaps(positions)
            ids[positions] = merged[positions]
            kept = np.ones(len(ids), dtype=bool)
            kept[positions + 1] = False
            ids = ids[kept]
            word = word[kept]
            # The pair of a removed id moves to the id that replaces it; both of its neighbors are looked up again.
            merged = merged[kept]
            positions -= np.arange(len(positions))
            self._look_up(merged, positions, ids, word)
            self._look_up(merged, positions[positions > 0] - 1, ids, word)

    def _look_up(self, merged: np.ndarray, positions: np.ndarray, ids: np.ndarray, word: np.ndarray) -> None:
        """Set the merges of the pairs at positions; there is none across words."""
        merged[positions] = NO_MERGE
        positions = positions[positions < len(ids) - 1]
        positions = positions[word[positions] == word[positions + 1]]
        merged[positions] = self._table.find(ids[positions], ids[positions + 1])


def _without_overlaps(positions: np.ndarray) -> np.ndarray:
    """Of adjacent positions, keep every second one from the left: "aaa" has one pair of the two that overlap."""
    adjacent = np.diff(positions, prepend=-2) == 1
    if not adjacent.any():
        return positions
    index = np.arange(len(positions))
    run_start = np.maximum.accumulate(np.where(adjacent, 0, index))
    return positions[(index - run_start) % 2 == 0]
