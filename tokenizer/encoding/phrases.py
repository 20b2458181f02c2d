"""Join the ids of neighboring pre-tokens into phrases: `tokenizer.encoding.reference.join_phrases`, vectorized."""

from __future__ import annotations

import numpy as np

from tokenizer.encoding.trie import NODE_BITS, Trie
from tokenizer.vocabulary import PhraseTable


class PhraseJoiner:
    """Joins int32 arrays with one table of phrases. Immutable after construction, hence safe to share."""

    def __init__(self, table: PhraseTable, caps: int) -> None:
        # A trie over characters works for ids as well: an id is used as a code point.
        self._trie = Trie(["".join(map(chr, parts)) for parts in table.sequences])
        ids = np.array([*table.sequences.values(), -1], dtype=np.int32)
        self._phrase_at = ids[self._trie.text_at]
        self._caps = caps

    def join(self, ids: np.ndarray) -> np.ndarray:
        """Replace, from left to right, the longest phrase that starts at a position by its id.

        Args:
            ids: int32 [T].

        Returns:
            int32 [T'] with T' <= T.
        """
        sizes, phrases = self._longest_phrases(ids)
        candidates = np.flatnonzero(sizes)
        if not len(candidates):
            return ids
        # Each candidate links to the first one at or after its end; following the links is the choice left to right.
        candidates_before = np.concatenate(([0], np.cumsum(sizes > 0)))
        following = candidates_before[candidates + sizes[candidates]].tolist()
        chosen = []
        current = 0
        while current < len(following):
            chosen.append(current)
            current = following[current]
        positions = candidates[chosen]
        out = ids.copy()
        out[positions] = phrases[positions]
        keep = np.ones(len(ids), dtype=bool)
        lengths = sizes[positions]
        for offset in range(1, int(lengths.max())):
            keep[positions[lengths > offset] + offset] = False
        return out[keep]

    def join_rows(self, ids: np.ndarray, lengths: np.ndarray, separator: int) -> tuple[np.ndarray, np.ndarray]:
        """Join phrases within rows that are stored one after another.

        Args:
            ids: int32 [sum of lengths].
            lengths: int64 [B].
            separator: A code point that is no id; it keeps phrases from crossing rows.

        Returns:
            The joined ids and the new lengths.
        """
        ends = np.cumsum(lengths)
        joined = self.join(np.insert(ids, ends, separator))
        separators = np.flatnonzero(joined == separator)
        return np.delete(joined, separators), np.diff(separators, prepend=-1) - 1

    def _longest_phrases(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (number of ids, phrase id), both [T], of the longest phrase at each position; 0 ids if none."""
        sizes = np.zeros(len(ids), dtype=np.int64)
        phrases = np.zeros(len(ids), dtype=np.int32)
        nodes = self._trie.first[ids]
        if self._caps >= 0:
            nodes[1:][ids[:-1] == self._caps] = 0  # <CAPS> applies to one token of the text before joining
        positions = np.flatnonzero(nodes)
        nodes = nodes[positions]
        codes = ids.astype(np.uint32)
        length = 1
        while len(positions):
            inside = positions + length < len(ids)
            positions = positions[inside]
            nodes = nodes[inside]
            alive, nodes = self._trie.step(nodes, codes[positions + length])
            positions = positions[alive]
            length += 1
            phrase_ids = self._phrase_at[nodes >> NODE_BITS]
            complete = np.flatnonzero(phrase_ids >= 0)
            sizes[positions[complete]] = length
            phrases[positions[complete]] = phrase_ids[complete]
        return sizes, phrases
