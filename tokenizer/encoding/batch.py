"""Many keys at once: the reference segmentation of `tokenizer.segment`, vectorised with NumPy.

All keys of a group stand beside one another in a matrix of characters. A trie over the entries is walked from every
place of every key at the same time, then the Viterbi recursion runs from right to left over all keys in step.
The trie is exact: a node is found by its parent's number and a character, never by a hash of its text alone.
"""

from __future__ import annotations

import numpy as np

from tokenizer.encoding.segment import segment_key
from tokenizer.vocabulary import FIRST_BYTE, Vocabulary

_CELLS = 1 << 20
"""Cells (key, start, length) that are worked on together: more would leave the cache."""
_NO_EDGE = 40_000  # in uint16 together with _UNREACHED below 65,536, above every real cost
_UNREACHED = 20_032
_STEP = 64  # costs are kept times 64, with 63 - (length - 1) added: the longest of equals is the least
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
NODE_BITS = np.uint64(21)
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)


class Trie:
    """A trie over texts, stepped for many nodes at once.

    A node is its number times 2**21 (uint64), so that a node and a character make a key by "or"; node 0 is "no such
    prefix". `text_at[number]` is the index of the text that ends there, or -1.
    """

    def __init__(self, texts: list[str]) -> None:
        order = sorted(range(len(texts)), key=texts.__getitem__)
        lengths = np.array([len(texts[index]) for index in order])
        width = int(lengths.max())
        flat = np.frombuffer("".join(texts[index] for index in order).encode("utf-32-le", "surrogatepass"), np.uint32)
        codes = np.zeros((len(order), width), dtype=np.uint32)
        inside = np.arange(width) < lengths[:, None]
        codes[inside] = flat
        fresh = np.ones(codes.shape, dtype=bool)
        np.logical_or.accumulate(codes[1:] != codes[:-1], axis=1, out=fresh[1:])
        fresh &= inside
        nodes = np.zeros(codes.shape, dtype=np.int64)
        nodes[fresh] = np.arange(1, np.count_nonzero(fresh) + 1)
        np.maximum.accumulate(nodes, axis=0, out=nodes)
        self.text_at = np.full(int(nodes.max()) + 1, -1, dtype=np.int32)
        self.text_at[nodes[np.arange(len(order)), lengths - 1]] = order
        self.first = np.zeros(0x110000, dtype=np.uint64)
        self.first[codes[:, 0]] = nodes[:, 0].astype(np.uint64) << NODE_BITS
        inner = fresh[:, 1:]
        self._fill_table(nodes[:, :-1][inner], codes[:, 1:][inner], nodes[:, 1:][inner])

    def _fill_table(self, parents: np.ndarray, codes: np.ndarray, nodes: np.ndarray) -> None:
        bits = max(8, int(4 * len(nodes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._mask = np.uint64((1 << bits) - 1)
        self._keys = np.full(1 << bits, _EMPTY, dtype=np.uint64)
        self._values = np.zeros(1 << bits, dtype=np.uint64)
        keys = parents.astype(np.uint64) << NODE_BITS | codes
        slots = (keys * _GOLDEN) >> self._shift
        owner = np.zeros(1 << bits, dtype=np.int64)
        left = np.arange(len(keys))
        while len(left):
            free = self._keys[slots[left]] == _EMPTY
            owner[slots[left[free]]] = left[free]
            won = free.copy()
            won[free] = owner[slots[left[free]]] == left[free]
            placed = left[won]
            self._keys[slots[placed]] = keys[placed]
            self._values[slots[placed]] = nodes[placed].astype(np.uint64) << NODE_BITS
            left = left[~won]
            slots[left] = (slots[left] + np.uint64(1)) & self._mask

    def step(self, nodes: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices, children): which of the nodes (uint64 [n]) have a child by their character (uint32 [n]), and it."""
        keys = nodes | codes
        slots = (keys * _GOLDEN) >> self._shift
        found = self._keys[slots]
        match = found == keys
        left = np.flatnonzero(~match & (found != _EMPTY))
        while len(left):  # linear probing, at a quarter full rarely more than once
            slots[left] = (slots[left] + np.uint64(1)) & self._mask
            found = self._keys[slots[left]]
            hit = found == keys[left]
            match[left[hit]] = True
            left = left[~hit & (found != _EMPTY)]
        alive = np.flatnonzero(match)
        return alive, self._values[slots[alive]]


class BatchSegmenter:
    """Segments lists of keys of one vocabulary; holds nothing that changes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        texts = list(vocabulary.edges)
        edges = list(vocabulary.edges.values())
        self.trie = Trie(texts)
        at = self.trie.text_at
        last = np.array([ids[-1] for ids in edges], dtype=np.int32)
        mark = np.array([ids[0] if len(ids) == 2 else -1 for ids in edges], dtype=np.int32)
        # Both by node; node 0 and inner nodes get -1.
        self._id = np.where(at >= 0, last[at], -1).astype(np.int32)
        self._mark = np.where(at >= 0, mark[at], -1).astype(np.int32)
        self._cost = np.where(at >= 0, np.where(self._mark >= 0, 2, 1), 0).astype(np.uint16) * _STEP
        self._depth = vocabulary.longest

    def segment(self, keys: list[str]) -> list[bytes]:
        """The int32 ids of each key, as bytes."""
        found = [b""] * len(keys)
        for members, ids, ends in self._groups(keys):
            data = ids.tobytes()
            start = 0
            for member, end in zip(members, (4 * ends).tolist(), strict=True):
                found[member] = data[start:end]
                start = end
        return found

    def usage(self, keys: list[str], weights: np.ndarray) -> np.ndarray:
        """How often each id is used (int64 [size]) when every key occurs `weights` (int64 [n]) times."""
        used = np.zeros(self.vocabulary.size, dtype=np.float64)
        for members, ids, ends in self._groups(keys):
            repeats = np.diff(ends, prepend=0)
            used += np.bincount(ids, weights=np.repeat(weights[members], repeats), minlength=len(used))
        return used.astype(np.int64)

    def _groups(self, keys: list[str]):
        """Yield (indices of keys, their ids one behind another, end of each key's ids)."""
        lengths = np.fromiter(map(len, keys), dtype=np.int16, count=len(keys))
        order = np.argsort(lengths, kind="stable")
        lengths = lengths[order]
        start = 0
        while start < len(order):
            width = int(lengths[start])
            # The longest key of a group sets the width of all: it may be a quarter longer than the shortest.
            widest = width + max(2, width // 4)
            most = max(64, _CELLS // (widest * min(widest, self._depth)))
            stop = min(start + most, int(np.searchsorted(lengths, widest, side="right")))
            members = order[start:stop].tolist()
            start = stop
            chosen = [keys[index] for index in members]
            if "\0" in "".join(chosen):  # the matrix is padded with zeros
                ids = [segment_key(key, self.vocabulary) for key in chosen]
                ends = np.cumsum([len(row) for row in ids])
                yield members, np.array([id_ for row in ids for id_ in row], dtype=np.int32), ends
            else:
                yield members, *self._segment_group(chosen)

    def _segment_group(self, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all keys one behind another, end of each key's ids)."""
        lengths = np.array(list(map(len, keys)))
        width, count = int(lengths.max()), len(keys)
        codes = np.array(keys, dtype=f"U{width}").view(np.uint32).reshape(count, width).T.ravel()  # [start, key]
        costs, nodes = self._match(codes, width, count)
        best = np.full((width + 1, count), _UNREACHED, dtype=np.uint16)
        best[lengths, np.arange(count)] = 0
        lengths_chosen = np.empty((width, count), dtype=np.int8)
        depth = costs.shape[1]
        for start in range(width - 1, -1, -1):
            reach = min(depth, width - start)
            least = (costs[start, :reach] + best[start + 1 : start + 1 + reach]).min(axis=0)
            lengths_chosen[start] = _STEP - (least & (_STEP - 1))
            inside = lengths > start
            best[start, inside] = least[inside] & ~np.uint16(_STEP - 1)
        ends = np.cumsum((best[0] // _STEP).astype(np.int64))
        return self._read_out(codes, nodes, lengths_chosen, lengths, ends), ends

    def _match(self, codes: np.ndarray, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(cost uint16, node int32), both [start, length - 1, key], of every entry that lies in a key."""
        depth = min(width, self._depth)
        costs = np.full((width, depth, count), _NO_EDGE, dtype=np.uint16)
        nodes = np.zeros((width, depth, count), dtype=np.int32)
        flat_costs, flat_nodes = costs.ravel(), nodes.ravel()
        here = self.trie.first[codes]
        number = here >> NODE_BITS
        single = self._cost[number]
        # A character without an entry costs its bytes; node 0 marks it.
        fallback = (1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)).astype(np.uint16) * _STEP
        costs[:, 0] = (np.where(single > 0, single, fallback) + np.uint16(_STEP - 1)).reshape(width, count)
        nodes[:, 0] = np.where(single > 0, number, 0).reshape(width, count)
        places = np.flatnonzero(here)
        here = here[places]
        cells = places + (places // count) * ((depth - 1) * count)
        padded = np.concatenate((codes, np.zeros(depth * count, dtype=np.uint32)))  # no entry contains a zero
        for length in range(1, depth):
            alive, here = self.trie.step(here, padded[places + length * count])
            if not len(alive):
                break
            places, cells = places[alive], cells[alive]
            number = here >> NODE_BITS
            cost = self._cost[number]
            full = np.flatnonzero(cost)
            target = cells[full] + length * count
            flat_costs[target] = cost[full] + np.uint16(_STEP - 1 - length)
            flat_nodes[target] = number[full]
        return costs, nodes

    def _read_out(
        self, codes: np.ndarray, nodes: np.ndarray, chosen: np.ndarray, lengths: np.ndarray, ends: np.ndarray
    ) -> np.ndarray:
        count = len(lengths)
        out = np.empty(int(ends[-1]), dtype=np.int32)
        cursor = np.concatenate(([0], ends[:-1]))
        key, start = np.arange(count), np.zeros(count, dtype=np.int64)
        while len(key):
            length = chosen[start, key]
            node = nodes[start, length - 1, key]
            known = np.flatnonzero(node)
            marked = known[self._mark[node[known]] >= 0]
            out[cursor[marked]] = self._mark[node[marked]]
            cursor[marked] += 1
            out[cursor[known]] = self._id[node[known]]
            cursor[known] += 1
            unknown = np.flatnonzero(node == 0)
            if len(unknown):
                cursor[unknown] = _write_bytes(out, cursor[unknown], codes[start[unknown] * count + key[unknown]])
            start = start + length
            going = np.flatnonzero(start < lengths[key])
            key, start, cursor = key[going], start[going], cursor[going]
        return out


def _write_bytes(out: np.ndarray, cursor: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Write the byte tokens of characters at the cursors; return the cursors behind them."""
    codes = codes.astype(np.int32)
    size = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    lead = np.array([0, 0, 0xC0, 0xE0, 0xF0])[size]
    out[cursor] = FIRST_BYTE + (lead | codes >> 6 * (size - 1))
    for index in range(1, 4):
        more = np.flatnonzero(size > index)
        shift = 6 * (size[more] - 1 - index)
        out[cursor[more] + index] = FIRST_BYTE + (0x80 | (codes[more] >> shift & 0x3F))
    return cursor + size
