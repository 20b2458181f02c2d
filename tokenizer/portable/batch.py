"""Merge the bytes of many pre-tokens at once: `tokenizer.portable.reference.merge_bytes`, vectorized with NumPy.

In each round, every word applies the best of its merges everywhere it can. This is exact: a merge only makes pairs that
were learned later, so the other places of the same merge come next anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokenizer.encoding.bulk import BulkEncoder, Words
from tokenizer.encoding.key_table import KeyTable
from tokenizer.encoding.word_cache import MAX_KEPT, WordCache, WordIds
from tokenizer.portable.boundaries import find_starts
from tokenizer.portable.pretokens import blocks_to_encode
from tokenizer.portable.reference import segment_data
from tokenizer.vocabulary import FIRST_BYTE, Vocabulary

NO_MERGE = 2**31 - 1
_NO_ID = np.int32(-1)
"""In place of an id: there is a word's border."""
_CHANGED = np.int32(-2)
"""In place of a merge: one of the two ids is new."""
_MAX_BATCHED = 192
"""Bytes of the longest pre-token in a batch, whose rounds are as many as its merges."""


class PairTable:
    """The id of the merge of each pair of ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        pairs = np.array(vocabulary.merges, dtype=np.uint64).reshape(-1, 2)
        ids = vocabulary.first_merge + np.arange(len(pairs), dtype=np.int32)
        self._ids = KeyTable(pairs[:, 0] << np.uint64(32) | pairs[:, 1], ids, missing=NO_MERGE)
        bytes_ = np.arange(FIRST_BYTE, FIRST_BYTE + 256, dtype=np.int32)
        self._ids_of_bytes = self.find(np.repeat(bytes_, 256), np.tile(bytes_, 256))

    def find_bytes(self, data: np.ndarray) -> np.ndarray:
        """Return the id of the merge of each byte (uint8 [n]) and the next one, int32 [n]; the last is arbitrary."""
        pairs = data.astype(np.int64) << 8
        pairs[:-1] |= data[1:]
        return self._ids_of_bytes.take(pairs)

    def find(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the id of the merge of each pair (int32 [n] each), `NO_MERGE` where there is none."""
        return self._ids.find(left.astype(np.uint64) << np.uint64(32) | right.astype(np.uint64))


class BatchMerger:
    """Merges the bytes of lists of words with one vocabulary. Immutable after construction, hence safe to share."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._table = PairTable(vocabulary)
        self._size = vocabulary.size

    def merge(self, words: list[bytes]) -> Iterator[WordIds]:
        """Yield the ids that merges make of words, those of some words at a time; no word may be empty."""
        # `_NO_ID` is before, between and after the words, so that every id has two neighbors.
        data = np.frombuffer(b"\0".join([b"", *words, b""]), dtype=np.uint8)
        borders = np.cumsum([0, *[len(word) + 1 for word in words]])
        yield from self._merge(data, borders)

    def merge_places(self, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Iterator[WordIds]:
        """Yield `merge` of words that are given as places in bytes.

        Args:
            data: uint8, at least one more after the last word.
            starts: First byte of each word, int64 [n].
            lengths: Bytes of each word, int64 [n], each at least 1.
        """
        borders = np.concatenate(([0], np.cumsum(lengths + 1)))
        # The byte before each word and the words follow each other; the byte at a border does not matter.
        shifts = np.repeat(starts - 1 - borders[:-1], lengths + 1)
        places = np.append(shifts + np.arange(len(shifts)), 0)
        yield from self._merge(data.take(places, mode="clip"), borders)

    def usage(self, words: list[bytes], weights: np.ndarray) -> np.ndarray:
        """Return how often each id is used (int64 [V]) if word i occurs `weights[i]` times (int64 [n])."""
        used = np.zeros(self._size, dtype=np.float64)
        for members, ids, counts in self.merge(words):
            used += np.bincount(ids, weights=np.repeat(weights[members], counts), minlength=self._size)
        return used.astype(np.int64)

    def _merge(self, data: np.ndarray, borders: np.ndarray) -> Iterator[WordIds]:
        """Yield the ids of words whose bytes are between the positions `borders` of `data`."""
        members = np.arange(len(borders) - 1)
        ids = data + np.int32(FIRST_BYTE)
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


def bulk_encoder(vocabulary: Vocabulary) -> BulkEncoder:
    """Return an encoder of long texts with a portable vocabulary."""
    merger = BatchMerger(vocabulary)

    def segment(words: Words, indices: np.ndarray) -> Iterator[WordIds]:
        starts = words.byte_starts[indices]
        lengths = words.lengths[indices]
        # The cache has all entries that it can keep, so that shorter words are not entries.
        is_alone = np.zeros(len(indices), dtype=bool)
        for member in np.flatnonzero(lengths > MAX_KEPT).tolist():
            word = words.data[starts[member] : starts[member] + lengths[member]].tobytes()
            if len(word) > _MAX_BATCHED or word in vocabulary.id_of_data:
                is_alone[member] = True
                ids = np.array(segment_data(word, vocabulary), dtype=np.int32)
                yield np.array([member]), ids, np.array([len(ids)])
        together = np.flatnonzero(~is_alone)
        if len(together):
            for members, ids, counts in merger.merge_places(words.data, starts[together], lengths[together]):
                yield together[members], ids, counts

    cache = WordCache({data: (id_,) for data, id_ in vocabulary.id_of_data.items()})
    return BulkEncoder(cache, blocks_to_encode, find_starts, segment)
