"""Segment many pre-tokens at once: `tokenizer.encoding.reference`, vectorized with NumPy.

The pre-tokens of a group form a matrix of characters. A trie over the entries is walked from every position of every
pre-token at the same time; then the Viterbi recursion runs from right to left over all of them in step.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokenizer.encoding.boundaries import find_starts
from tokenizer.encoding.bulk import BulkEncoder, Words
from tokenizer.encoding.pretokenization import blocks_to_encode
from tokenizer.encoding.reference import segment_pretoken
from tokenizer.encoding.trie import NODE_BITS, Trie
from tokenizer.encoding.unicode import text_to_bytes
from tokenizer.encoding.word_cache import WordCache, WordIds
from tokenizer.vocabulary import FIRST_BYTE, Vocabulary

_MAX_CELLS = 1 << 20
"""Cells (pre-token, start, length) processed together; more would not fit into the cache."""
_NO_EDGE = 40_000  # above every real cost; the sum with _UNREACHED still fits into uint16
_UNREACHED = 20_032
# Costs are multiplied by this, and 63 - (length - 1) is added: of equal costs, the longest token has the lowest.
_COST_UNIT = 64


class BatchSegmenter:
    """Segments lists of pre-tokens with one vocabulary. Immutable after construction, hence safe to share."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        texts = list(vocabulary.edges)
        edges = list(vocabulary.edges.values())
        self.trie = Trie(texts)
        text_at = self.trie.text_at
        last = np.array([ids[-1] for ids in edges], dtype=np.int32)
        mark = np.array([ids[0] if len(ids) == 2 else -1 for ids in edges], dtype=np.int32)
        # Both are indexed by node number; node 0 and inner nodes have -1.
        self._id = np.where(text_at >= 0, last[text_at], -1).astype(np.int32)
        self._mark = np.where(text_at >= 0, mark[text_at], -1).astype(np.int32)
        tokens = np.where(text_at >= 0, np.where(self._mark >= 0, 2, 1), 0)
        self._cost = tokens.astype(np.uint16) * _COST_UNIT
        self._max_length = vocabulary.longest

    def usage(self, pretokens: list[str], weights: np.ndarray) -> np.ndarray:
        """Return how often each id is used (int64 [V]) if pre-token i occurs `weights[i]` times (int64 [n])."""
        used = np.zeros(self.vocabulary.size, dtype=np.float64)
        for members, ids, counts in self.segment(pretokens):
            used += np.bincount(ids, weights=np.repeat(weights[members], counts), minlength=len(used))
        return used.astype(np.int64)

    def segment(self, pretokens: list[str]) -> Iterator[WordIds]:
        """Yield the ids of pre-tokens, those of some of similar length at a time."""
        lengths = np.fromiter(map(len, pretokens), dtype=np.int16, count=len(pretokens))
        order = np.argsort(lengths, kind="stable")
        lengths = lengths[order]
        start = 0
        while start < len(order):
            shortest = int(lengths[start])
            # The longest member sets the width of the matrix: it may exceed the shortest by a quarter.
            longest = shortest + max(2, shortest // 4)
            max_members = max(64, _MAX_CELLS // (longest * min(longest, self._max_length)))
            stop = min(start + max_members, int(np.searchsorted(lengths, longest, side="right")))
            members = order[start:stop]
            start = stop
            group = [pretokens[index] for index in members.tolist()]
            if "\0" in "".join(group):  # the matrix is padded with zeros
                rows = [segment_pretoken(pretoken, self.vocabulary) for pretoken in group]
                counts = np.array([len(row) for row in rows])
                yield members, np.array([id_ for row in rows for id_ in row], dtype=np.int32), counts
            else:
                ids, counts = self._segment_group(group)
                yield members, ids, counts

    def _segment_group(self, pretokens: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return (concatenated ids, number of ids of each pre-token)."""
        lengths = np.array(list(map(len, pretokens)))
        width = int(lengths.max())
        count = len(pretokens)
        codes = np.array(pretokens, dtype=f"U{width}").view(np.uint32).reshape(count, width).T.ravel()
        costs, nodes = self._match(codes, width, count)
        best = np.full((width + 1, count), _UNREACHED, dtype=np.uint16)
        best[lengths, np.arange(count)] = 0
        chosen_lengths = np.empty((width, count), dtype=np.int8)
        max_length = costs.shape[1]
        for start in range(width - 1, -1, -1):
            reach = min(max_length, width - start)
            lowest = (costs[start, :reach] + best[start + 1 : start + 1 + reach]).min(axis=0)
            chosen_lengths[start] = _COST_UNIT - (lowest & (_COST_UNIT - 1))
            inside = lengths > start
            best[start, inside] = lowest[inside] & ~np.uint16(_COST_UNIT - 1)
        counts = (best[0] // _COST_UNIT).astype(np.int64)
        return self._read_out(codes, nodes, chosen_lengths, lengths, np.cumsum(counts)), counts

    def _match(self, codes: np.ndarray, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Find every entry that occurs in a pre-token.

        Args:
            codes: Code points, uint32 [width * count], position by position.
            width: Characters of the longest pre-token.
            count: Number of pre-tokens.

        Returns:
            Costs (uint16) and node numbers (int32), both [start, length - 1, pre-token].
        """
        depth = min(width, self._max_length)
        costs = np.full((width, depth, count), _NO_EDGE, dtype=np.uint16)
        nodes = np.zeros((width, depth, count), dtype=np.int32)
        flat_costs = costs.ravel()
        flat_nodes = nodes.ravel()
        active = self.trie.first.take(codes)
        numbers = (active >> NODE_BITS).view(np.int64)
        single = self._cost.take(numbers)
        # A character without an entry costs as many tokens as it has bytes; node 0 marks it.
        fallback = _utf8_lengths(codes).astype(np.uint16) * _COST_UNIT
        costs[:, 0] = (np.where(single > 0, single, fallback) + np.uint16(_COST_UNIT - 1)).reshape(width, count)
        nodes[:, 0] = np.where(single > 0, numbers, 0).reshape(width, count)
        positions = np.flatnonzero(active)
        active = active[positions]
        cells = positions + (positions // count) * ((depth - 1) * count)
        padded = np.concatenate((codes, np.zeros(depth * count, dtype=np.uint32)))  # no entry contains a zero
        for length in range(1, depth):
            alive, active = self.trie.step(active, padded.take(positions + length * count))
            if not len(alive):
                break
            positions = positions.take(alive)
            cells = cells.take(alive)
            numbers = (active >> NODE_BITS).view(np.int64)
            cost = self._cost.take(numbers)
            complete = np.flatnonzero(cost)
            target = cells.take(complete) + length * count
            flat_costs[target] = cost.take(complete) + np.uint16(_COST_UNIT - 1 - length)
            flat_nodes[target] = numbers.take(complete)
        return costs, nodes

    def _read_out(
        self, codes: np.ndarray, nodes: np.ndarray, chosen: np.ndarray, lengths: np.ndarray, ends: np.ndarray
    ) -> np.ndarray:
        """Follow the chosen lengths from left to right and write the ids, one token of every pre-token at a time."""
        count = len(lengths)
        depth = nodes.shape[1]
        out = np.empty(int(ends[-1]), dtype=np.int32)
        cursor = np.concatenate(([0], ends[:-1]))
        member = np.arange(count)
        start = np.zeros(count, dtype=np.int64)
        while len(member):
            length = chosen.take(start * count + member).astype(np.int64)
            node = nodes.take((start * depth + length - 1) * count + member)
            known = np.flatnonzero(node)
            known_node = node.take(known)
            mark = self._mark.take(known_node)
            at = cursor.take(known)
            marked = np.flatnonzero(mark >= 0)
            out[at.take(marked)] = mark.take(marked)
            at[marked] += 1
            out[at] = self._id.take(known_node)
            cursor[known] = at + 1
            unknown = np.flatnonzero(node == 0)
            if len(unknown):
                characters = codes[start[unknown] * count + member[unknown]]
                cursor[unknown] = _write_bytes(out, cursor[unknown], characters)
            start = start + length
            unfinished = np.flatnonzero(start < lengths.take(member))
            member = member.take(unfinished)
            start = start.take(unfinished)
            cursor = cursor.take(unfinished)
        return out


def _utf8_lengths(codes: np.ndarray) -> np.ndarray:
    return 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)


def _write_bytes(out: np.ndarray, cursor: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Write the byte tokens of characters at the cursors; return the cursors after them."""
    codes = codes.astype(np.int32)
    size = _utf8_lengths(codes)
    lead = np.array([0, 0, 0xC0, 0xE0, 0xF0])[size]
    out[cursor] = FIRST_BYTE + (lead | codes >> 6 * (size - 1))
    for index in range(1, 4):
        more = np.flatnonzero(size > index)
        shift = 6 * (size[more] - 1 - index)
        out[cursor[more] + index] = FIRST_BYTE + (0x80 | (codes[more] >> shift & 0x3F))
    return cursor + size


def bulk_encoder(vocabulary: Vocabulary) -> BulkEncoder:
    """Return an encoder of long texts; phrases are not joined."""
    segmenter = BatchSegmenter(vocabulary)

    def segment(words: Words, indices: np.ndarray) -> Iterator[WordIds]:
        places = zip(words.starts[indices].tolist(), words.stops[indices].tolist(), strict=True)
        return segmenter.segment([words.text[start:stop] for start, stop in places])

    # An entry, or <UP> and an entry, is its own segmentation.
    known = {text_to_bytes(text): ids for text, ids in vocabulary.edges.items() if ids[0] != vocabulary.caps}
    return BulkEncoder(WordCache(known), blocks_to_encode, find_starts, segment)
