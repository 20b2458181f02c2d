"""A trie over texts that advances many nodes at once with NumPy.

The child of a node is looked up by the node's number and a character in a hash table.
"""

from __future__ import annotations

import numpy as np

from tokenizer.encoding.key_table import KeyTable

NODE_BITS = np.uint64(21)  # a code point needs 21 bits


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
        keys = nodes[:, :-1][has_parent].astype(np.uint64) << NODE_BITS | codes[:, 1:][has_parent]
        self._children = KeyTable(keys, nodes[:, 1:][has_parent].astype(np.uint64) << NODE_BITS, missing=0)

    def step(self, nodes: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Advance each node by one character.

        Args:
            nodes: uint64 [n].
            codes: Code points, uint32 [n].

        Returns:
            The indices of the nodes that have such a child (int64 [m]) and the children (uint64 [m]).
        """
        return self._children.find_known(nodes | codes)
