"""Joining the ids of neighbouring keys to phrases: `tokenizer.segment.join_phrases`, vectorised."""

from __future__ import annotations

import numpy as np

from tokenizer.encoding.batch import NODE_BITS, Trie
from tokenizer.vocabulary import PhraseTable


class PhraseJoiner:
    """Joins int arrays by one table of phrases; holds nothing that changes."""

    def __init__(self, table: PhraseTable, caps: int) -> None:
        # A trie over characters serves for ids as well: an id is a code point here.
        self._trie = Trie(["".join(map(chr, parts)) for parts in table.sequences])
        ids = np.array([*table.sequences.values(), -1], dtype=np.int32)
        self._phrase_at = ids[self._trie.text_at]
        self._caps = caps

    def join(self, ids: np.ndarray) -> np.ndarray:
        """int32 [T] to int32 [at most T]: from left to right the longest phrase that fits, else the id itself."""
        sizes, phrases = self._longest(ids)
        candidates = np.flatnonzero(sizes)
        if not len(candidates):
            return ids
        # From each candidate to the first one behind its end; this chain is the choice from left to right.
        before = np.concatenate(([0], np.cumsum(sizes > 0)))
        following = before[candidates + sizes[candidates]].tolist()
        chosen, at = [], 0
        while at < len(following):
            chosen.append(at)
            at = following[at]
        places = candidates[chosen]
        out = ids.copy()
        out[places] = phrases[places]
        keep = np.ones(len(ids), dtype=bool)
        lengths = sizes[places]
        for offset in range(1, int(lengths.max())):
            keep[places[lengths > offset] + offset] = False
        return out[keep]

    def join_rows(self, ids: np.ndarray, lengths: np.ndarray, border: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for rows that lie one behind another (`lengths` int [B]); `border` is a number that is no id."""
        ends = np.cumsum(lengths)
        joined = self.join(np.insert(ids, ends, border))
        borders = np.flatnonzero(joined == border)
        return np.delete(joined, borders), np.diff(borders, prepend=-1) - 1

    def _longest(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(length, phrase id), both [T], of the longest phrase that begins at each place; length 0 for none."""
        sizes = np.zeros(len(ids), dtype=np.int64)
        phrases = np.zeros(len(ids), dtype=np.int32)
        nodes = self._trie.first[ids]
        if self._caps >= 0:
            nodes[1:][ids[:-1] == self._caps] = 0
        places = np.flatnonzero(nodes)
        nodes = nodes[places]
        codes = ids.astype(np.uint32)
        length = 1
        while len(places):
            inside = places + length < len(ids)
            places, nodes = places[inside], nodes[inside]
            alive, nodes = self._trie.step(nodes, codes[places + length])
            places = places[alive]
            length += 1
            found = self._phrase_at[nodes >> NODE_BITS]
            full = np.flatnonzero(found >= 0)
            sizes[places[full]] = length
            phrases[places[full]] = found[full]
        return sizes, phrases
