"""A trie over texts that advances many nodes at once with NumPy.

The child of a node is looked up by the node's number and a character in an open-addressing hash table. Keys are exact,
so there are no false matches.
"""

from __future__ import annotations

import numpy as np

NODE_BITS = np.uint64(21)  # a code point needs 21 bits
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # multiplicative hashing (Knuth)
_EMPTY_SLOT = np.uint64(0xFFFFFFFFFFFFFFFF)


class Trie:
    """A trie over distinct, non-empty texts.

    A node is represented by its number times 2**21 (uint64), so that ``node | code_point`` is the hash key of its
    child. Node 0 means "no such prefix".

    Attributes:
        text_at: int32 [number of nodes]; index of the text that ends at a node number, or -1.
        first: uint64 [0x110000]; node of each one-character prefix, or 0.
    """

    def __init__(self, texts: list[str]) -> None:
        order = sorted(range(len(texts)), key=texts.__getitem__)
        lengths = np.array([len(texts[index]) for index in order])
        width = int(lengths.max())
        flat = np.frombuffer("".join(texts[index] for index in order).encode("utf-32-le", "surrogatepass"), np.uint32)
        codes = np.zeros((len(order), width), dtype=np.uint32)
        inside = np.arange(width) < lengths[:, None]
        codes[inside] = flat
        # Texts are sorted: a prefix is new where it differs from the one of the text before.
        is_new = np.ones(codes.shape, dtype=bool)
        np.logical_or.accumulate(codes[1:] != codes[:-1], axis=1, out=is_new[1:])
        is_new &= inside
        nodes = np.zeros(codes.shape, dtype=np.int64)
        nodes[is_new] = np.arange(1, np.count_nonzero(is_new) + 1)
        np.maximum.accumulate(nodes, axis=0, out=nodes)
        self.text_at = np.full(int(nodes.max()) + 1, -1, dtype=np.int32)
        self.text_at[nodes[np.arange(len(order)), lengths - 1]] = order
        self.first = np.zeros(0x110000, dtype=np.uint64)
        self.first[codes[:, 0]] = nodes[:, 0].astype(np.uint64) << NODE_BITS
        has_parent = is_new[:, 1:]
        self._fill_table(nodes[:, :-1][has_parent], codes[:, 1:][has_parent], nodes[:, 1:][has_parent])

    def _fill_table(self, parents: np.ndarray, codes: np.ndarray, children: np.ndarray) -> None:
        """Insert all edges at once by linear probing; where several claim a slot, the last one written wins."""
        bits = max(8, int(4 * len(children)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._last_slot = (1 << bits) - 1
        self._keys = np.full(1 << bits, _EMPTY_SLOT, dtype=np.uint64)
        self._values = np.zeros(1 << bits, dtype=np.uint64)
        keys = parents.astype(np.uint64) << NODE_BITS | codes
        slots = ((keys * _GOLDEN_RATIO) >> self._shift).view(np.int64)
        owner = np.zeros(1 << bits, dtype=np.int64)
        pending = np.arange(len(keys))
        while len(pending):
            free = self._keys[slots[pending]] == _EMPTY_SLOT
            owner[slots[pending[free]]] = pending[free]
            won = free.copy()
            won[free] = owner[slots[pending[free]]] == pending[free]
            placed = pending[won]
            self._keys[slots[placed]] = keys[placed]
            self._values[slots[placed]] = children[placed].astype(np.uint64) << NODE_BITS
            pending = pending[~won]
            slots[pending] = (slots[pending] + 1) & self._last_slot

    def step(self, nodes: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Advance each node by one character.

        Args:
            nodes: uint64 [n].
            codes: Code points, uint32 [n].

        Returns:
            The indices of the nodes that have such a child (int64 [m]) and the children (uint64 [m]).
        """
        keys = nodes | codes
        slots = ((keys * _GOLDEN_RATIO) >> self._shift).view(np.int64)
        stored = self._keys.take(slots)
        match = stored == keys
        pending = np.flatnonzero(~match & (stored != _EMPTY_SLOT))
        while len(pending):  # linear probing; at a load of one quarter rarely more than one more probe
            at = (slots.take(pending) + 1) & self._last_slot
            slots[pending] = at
            stored = self._keys.take(at)
            hit = stored == keys.take(pending)
            match[pending[hit]] = True
            pending = pending[~hit & (stored != _EMPTY_SLOT)]
        alive = np.flatnonzero(match)
        return alive, self._values.take(slots.take(alive))
