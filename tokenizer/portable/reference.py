"""The reference encoder of portable tokenizers: the definition that the faster implementations must match.

It is that of byte-level BPE with whole words first, ``"ignore_merges": true`` in a ``tokenizer.json``: a pre-token
whose bytes are an entry is that entry. In any other, the adjacent pair that was learned first is merged, of equal pairs
the leftmost one, until no merge applies.
"""

from __future__ import annotations

import itertools
from heapq import heapify, heappop, heappush

from tokenizer.encoding.unicode import text_to_bytes
from tokenizer.portable.pretokens import split_pretokens
from tokenizer.vocabulary import FIRST_BYTE, Vocabulary

_NO_MERGE = 1 << 30
_LONG = 1024
"""Bytes from which a heap is faster than searching the whole list for each merge."""


def encode_reference(text: str, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of a text by definition."""
    return [id_ for word in split_pretokens(text) for id_ in segment_data(text_to_bytes(word), vocabulary)]


def segment_data(data: bytes, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of the bytes of a pre-token."""
    id_ = vocabulary.id_of_data.get(data)
    if id_ is not None:
        return [id_]
    return merge_bytes(data, vocabulary.merge_ids)


def merge_bytes(data: bytes, merge_ids: dict[tuple[int, int], int]) -> list[int]:
    """Return the ids that merges alone make of bytes.

    Args:
        data: Any bytes.
        merge_ids: {(left id, right id): id}, parents before children.
    """
    if len(data) >= _LONG:
        return merge_long(data, merge_ids)
    find = merge_ids.get
    ids = [FIRST_BYTE + value for value in data]
    merged = [find(pair, _NO_MERGE) for pair in itertools.pairwise(ids)]
    while merged:
        best = min(merged)
        if best == _NO_MERGE:
            break
        at = merged.index(best)
        ids[at : at + 2] = [best]
        del merged[at]
        if at < len(merged):
            merged[at] = find((best, ids[at + 1]), _NO_MERGE)
        if at:
            merged[at - 1] = find((ids[at - 1], best), _NO_MERGE)
    return ids


def merge_long(data: bytes, merge_ids: dict[tuple[int, int], int]) -> list[int]:
    """Return `merge_bytes` of long data, in time n log n."""
    find = merge_ids.get
    ids = [FIRST_BYTE + value for value in data]
    end = len(ids)
    following = list(range(1, end + 1))
    preceding = list(range(-1, end - 1))
    heap = [(find(pair, _NO_MERGE), at) for at, pair in enumerate(itertools.pairwise(ids))]
    heap = [item for item in heap if item[0] != _NO_MERGE]
    heapify(heap)
    while heap:
        best, at = heappop(heap)
        right = following[at]
        if right == end or ids[at] < 0 or find((ids[at], ids[right])) != best:
            continue  # one of the two was merged with another neighbor
        ids[at] = best
        ids[right] = -1
        after = following[right]
        following[at] = after
        if after != end:
            preceding[after] = at
            if (made := find((best, ids[after]))) is not None:
                heappush(heap, (made, at))
        before = preceding[at]
        if before >= 0 and (made := find((ids[before], best))) is not None:
            heappush(heap, (made, before))
    return [id_ for id_ in ids if id_ >= 0]
