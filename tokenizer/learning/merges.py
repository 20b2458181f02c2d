"""Learn byte-pair merges from weighted words, on flat NumPy arrays.

Byte-pair encoding after Sennrich, Haddow and Birch (2016), with a choice of scores. All words are stored one after
another in one array, with separators between them. Neighbors are linked, so a merge touches only the positions where it
applies. All positions of a pair are known when the younger of its two symbols appears and only disappear afterwards;
hence the heap holds upper bounds, which are corrected when they reach the top. Scores other than the frequency also
depend on the counts of both symbols, and rise when these fall: after each merge, the pairs of the two merged symbols
get new upper bounds. Everything else that a merge changes lowers scores: counts of pairs and of all symbols fall.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from math import log, log1p, sqrt
from typing import NamedTuple

import numpy as np

SEPARATOR = -1
_BOUND_MARGIN = 1.05
"""Factor of upper bounds that are raised: most small rises of a score then need no new one."""
_REMOVED = -2

Score = Callable[[int, int, int, int], float]
"""score(count of the pair, count of its left symbol, count of its right symbol, number of symbols)."""


def _frequency(pair: int, left: int, right: int, total: int) -> float:
    return float(pair)


def _frequency_root_pmi(pair: int, left: int, right: int, total: int) -> float:
    return pair * sqrt(max(log(pair * total / (left * right)), 1e-3))


def _pmi_log_frequency(pair: int, left: int, right: int, total: int) -> float:
    return max(log(pair * total / (left * right)), 0.0) * log1p(pair)


SCORES: dict[str, Score] = {
    "freq": _frequency,
    "freq_pmi": _frequency_root_pmi,
    "pmi": _pmi_log_frequency,
}


class Candidate(NamedTuple):
    """A pair of symbols, the positions (int32 [n]) of its left symbol and their total weight."""

    left: int
    right: int
    positions: np.ndarray
    weight: int


class PairMerger:
    """The state of one training: symbols, links between neighbors, and the heap of candidate pairs.

    Args:
        symbols: int32 [N], with `SEPARATOR` between words and at both ends.
        weights: int64 [N]; how often the word at each position occurs.
        texts: {symbol: text}.
        score: A key of `SCORES`.
        min_count: Pairs that occur less often are not considered.
    """

    def __init__(
        self, symbols: np.ndarray, weights: np.ndarray, texts: dict[int, str], score: str, min_count: int
    ) -> None:
        self.symbols = symbols
        self.weights = weights
        self.texts = texts
        self.ids = {text: symbol for symbol, text in texts.items()}
        self._score = SCORES[score]
        # {symbol: its pairs} and {pair: its upper bound in the heap}, for scores that rise when a symbol gets rarer.
        self._pairs_of: dict[int, set[tuple[int, int]]] | None = None if score == "freq" else {}
        self._bounds: dict[tuple[int, int], float] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._min_count = max(1, min_count)
        self._following = np.arange(1, len(symbols) + 1, dtype=np.int32)
        self._preceding = np.arange(-1, len(symbols) - 1, dtype=np.int32)
        self._positions: dict[tuple[int, int], np.ndarray] = {}
        self._heap: list[tuple[float, int, int]] = []
        used = symbols >= 0
        self._total = int(weights[used].sum())
        totals = np.bincount(symbols[used], weights=weights[used]).astype(np.int64)
        self._symbol_counts = {symbol: int(count) for symbol, count in enumerate(totals) if count}
        self._collect_initial_pairs()

    def _collect_initial_pairs(self) -> None:
        left = self.symbols[:-1]
        right = self.symbols[1:]
        positions = np.flatnonzero((left >= 0) & (right >= 0)).astype(np.int32)
        keys = left[positions].astype(np.int64) << 32 | right[positions]
        for key, group, count in self._group_by_key(keys, positions):
            self._add(key >> 32, key & 0xFFFFFFFF, group, count)

    def _group_by_key(self, keys: np.ndarray, positions: np.ndarray) -> list[tuple[int, np.ndarray, int]]:
        """Return (key, positions, weighted count) of each distinct key that is frequent enough."""
        if not len(keys):
            return []
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        positions = positions[order]
        changes = (keys[1:] != keys[:-1]).nonzero()[0]
        bounds = np.empty(len(changes) + 2, dtype=np.int64)
        bounds[0] = 0
        bounds[-1] = len(keys)
        bounds[1:-1] = changes + 1
        starts = bounds[:-1]
        ends = bounds[1:]
        counts = np.add.reduceat(self.weights[positions], starts)
        kept = (counts >= self._min_count).nonzero()[0]
        return [
            (key, positions[start:end], count)
            for key, start, end, count in zip(
                keys[starts[kept]].tolist(),
                starts[kept].tolist(),
                ends[kept].tolist(),
                counts[kept].tolist(),
                strict=True,
            )
        ]

    def _add(self, left: int, right: int, positions: np.ndarray, count: int) -> None:
        known = self._positions.get((left, right))
        if known is not None:
            positions = np.concatenate((known, positions))
            count = int(self.weights[positions].sum())
        self._positions[left, right] = positions
        if self._pairs_of is not None:
            self._counts[left, right] = count
            for symbol in (left, right):
                self._pairs_of.setdefault(symbol, set()).add((left, right))
        self._push(left, right, self._value(left, right, count))

    def _push(self, left: int, right: int, bound: float) -> None:
        if self._pairs_of is not None:
            self._bounds[left, right] = bound
        heapq.heappush(self._heap, (-bound, left, right))

    def _raise_bounds(self, symbol: int) -> None:
        """Push new upper bounds of all pairs of a symbol that became rarer."""
        assert self._pairs_of is not None
        pairs = {pair for pair in self._pairs_of.get(symbol, ()) if pair in self._positions}
        self._pairs_of[symbol] = pairs
        for left, right in pairs:
            if self._symbol_counts[left] and self._symbol_counts[right]:
                value = self._value(left, right, self._counts[left, right])
                if value > self._bounds[left, right]:
                    self._push(left, right, value * _BOUND_MARGIN)

    def _value(self, left: int, right: int, count: int) -> float:
        return self._score(count, self._symbol_counts[left], self._symbol_counts[right], self._total)

    def pop(self) -> Candidate | None:
        """Remove and return the best pair; None if no pair is left."""
        while self._heap:
            negative, left, right = heapq.heappop(self._heap)
            if self._pairs_of is not None and self._bounds.get((left, right)) != -negative:
                continue  # a higher bound was popped before
            positions = self._positions.pop((left, right), None)
            if positions is None:
                continue
            alive = (self.symbols[positions] == left) & (self.symbols[self._following[positions]] == right)
            positions = positions[alive]
            if left == right:
                positions = self._without_overlaps(positions)
            count = int(self.weights[positions].sum())
            if count < self._min_count:
                continue
            value = self._value(left, right, count)
            # The stored value was an upper bound: put the pair back unless it is still the best one.
            if self._heap and value < -negative and (-value, left, right) > self._heap[0]:
                self._positions[left, right] = positions
                self._counts[left, right] = count
                self._push(left, right, value)
                continue
            return Candidate(left, right, positions, count)
        return None

    def _without_overlaps(self, positions: np.ndarray) -> np.ndarray:
        """Keep every second position of a run of equal symbols: a symbol can be part of one merge only."""
        kept = []
        blocked = -1
        for position in np.unique(positions).tolist():
            if position != blocked:
                kept.append(position)
                blocked = int(self._following[position])
        return np.array(kept, dtype=np.int32)

    def apply(self, candidate: Candidate, symbol: int) -> None:
        """Replace a pair by a symbol at all of its positions, and register the pairs that this creates."""
        left, right, positions, count = candidate
        symbols = self.symbols
        following = self._following
        preceding = self._preceding
        second = following[positions]
        after = following[second]
        symbols[positions] = symbol
        symbols[second] = _REMOVED
        following[positions] = after
        preceding[after] = positions
        counts = self._symbol_counts
        counts[left] -= count
        counts[right] -= count
        counts[symbol] = counts.get(symbol, 0) + count
        self._total -= count
        if self._pairs_of is not None:
            for rarer in {left, right}:
                self._raise_bounds(rarer)
        before = preceding[positions]
        symbols_before = symbols[before]
        symbols_after = symbols[after]
        # Two adjacent new symbols see each other: their pair is counted from the left one only.
        has_left = (symbols_before >= 0) & (symbols_before != symbol)
        for key, group, weight in self._group_by_key(symbols_before[has_left], before[has_left]):
            self._add(key, symbol, group, weight)
        has_right = symbols_after >= 0
        for key, group, weight in self._group_by_key(symbols_after[has_right], positions[has_right]):
            self._add(symbol, key, group, weight)


def learn_merges(
    merger: PairMerger,
    max_merges: int,
    is_forbidden: Callable[[str], bool],
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Apply the best merges one after another.

    A pair that spells a known text becomes that text's symbol and does not count as a merge.

    Args:
        merger: The state of the training; it is changed.
        max_merges: Number of new texts to learn; fewer are learned if no pair is left.
        is_forbidden: Returns True for a text that must not become an entry.
        progress: Called as progress(merges learned, max_merges).

    Returns:
        The texts of the merges, best first.
    """
    merged: list[str] = []
    next_symbol = max(merger.texts) + 1
    while len(merged) < max_merges:
        best = merger.pop()
        if best is None:
            break
        text = merger.texts[best.left] + merger.texts[best.right]
        symbol = merger.ids.get(text)
        if symbol is None:
            if is_forbidden(text):
                continue
            symbol = next_symbol
            next_symbol += 1
            merger.texts[symbol] = text
            merger.ids[text] = symbol
            merged.append(text)
            if progress is not None and len(merged) % 256 == 0:
                progress(len(merged), max_merges)
        merger.apply(best, symbol)
    return merged
