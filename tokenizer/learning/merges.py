"""Byte-pair merges from weighted words, on flat NumPy arrays.

Byte-pair encoding after Sennrich, Haddow and Birch (2016), with a choice of score. The words lie behind one another
in one array with breaks between them; neighbours are linked, so that a merge touches only the places where it
applies. The places of a pair are all known when the younger of its two symbols appears and only vanish afterwards,
hence the heap holds upper bounds that are corrected when they come to the top.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from math import log, log1p, sqrt

import numpy as np

BREAK = -1
_GONE = -2

Score = Callable[[int, int, int, int], float]


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


class PairMerger:
    """The state of one training: symbols, links and the heap of candidate pairs.

    `symbols` is int32 [N] with `BREAK` between words; `weights` int64 [N] says how often the word of each place occurs;
    `texts` gives the text of each symbol; pairs that occur less than `floor` times are not considered.
    """

    def __init__(self, symbols: np.ndarray, weights: np.ndarray, texts: dict[int, str], score: str, floor: int) -> None:
        self.symbols = symbols
        self.weights = weights
        self.texts = texts
        self.ids = {text: symbol for symbol, text in texts.items()}
        self.score = SCORES[score]
        self.floor = max(1, floor)
        self.following = np.arange(1, len(symbols) + 1, dtype=np.int32)
        self.preceding = np.arange(-1, len(symbols) - 1, dtype=np.int32)
        self.places: dict[tuple[int, int], np.ndarray] = {}
        self.heap: list[tuple[float, int, int]] = []
        used = symbols >= 0
        self.total = int(weights[used].sum())
        totals = np.bincount(symbols[used], weights=weights[used]).astype(np.int64)
        self.symbol_counts = {symbol: int(count) for symbol, count in enumerate(totals) if count}
        self._collect_initial_pairs()

    def _collect_initial_pairs(self) -> None:
        left, right = self.symbols[:-1], self.symbols[1:]
        places = np.flatnonzero((left >= 0) & (right >= 0)).astype(np.int32)
        keys = left[places].astype(np.int64) << 32 | right[places]
        for key, group, count in self._groups(keys, places):
            self._add(key >> 32, key & 0xFFFFFFFF, group, count)

    def _groups(self, keys: np.ndarray, places: np.ndarray) -> list[tuple[int, np.ndarray, int]]:
        """(key, places, weight) of each distinct key that is frequent enough."""
        if not len(keys):
            return []
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        changes = (keys[1:] != keys[:-1]).nonzero()[0]
        bounds = np.empty(len(changes) + 2, dtype=np.int64)
        bounds[0], bounds[-1] = 0, len(keys)
        bounds[1:-1] = changes + 1
        starts, ends = bounds[:-1], bounds[1:]
        counts = np.add.reduceat(self.weights[places], starts)
        kept = (counts >= self.floor).nonzero()[0]
        return [
            (key, places[start:end], count)
            for key, start, end, count in zip(
                keys[starts[kept]].tolist(),
                starts[kept].tolist(),
                ends[kept].tolist(),
                counts[kept].tolist(),
                strict=True,
            )
        ]

    def _add(self, left: int, right: int, places: np.ndarray, count: int) -> None:
        known = self.places.get((left, right))
        if known is not None:
            places = np.concatenate((known, places))
            count = int(self.weights[places].sum())
        self.places[left, right] = places
        heapq.heappush(self.heap, (-self._value(left, right, count), left, right))

    def _value(self, left: int, right: int, count: int) -> float:
        return self.score(count, self.symbol_counts[left], self.symbol_counts[right], self.total)

    def pop(self) -> tuple[int, int, np.ndarray, int] | None:
        """The best pair there is now: (left, right, places, count); None when no pair is left."""
        while self.heap:
            negative, left, right = heapq.heappop(self.heap)
            places = self.places.pop((left, right), None)
            if places is None:
                continue
            alive = (self.symbols[places] == left) & (self.symbols[self.following[places]] == right)
            places = places[alive]
            if left == right:
                places = self._without_overlaps(places)
            count = int(self.weights[places].sum())
            if count < self.floor:
                continue
            value = self._value(left, right, count)
            if self.heap and value < -negative and (-value, left, right) > self.heap[0]:
                self.places[left, right] = places
                heapq.heappush(self.heap, (-value, left, right))
                continue
            return left, right, places, count
        return None

    def _without_overlaps(self, places: np.ndarray) -> np.ndarray:
        kept, blocked = [], -1
        for place in np.unique(places).tolist():
            if place != blocked:
                kept.append(place)
                blocked = int(self.following[place])
        return np.array(kept, dtype=np.int32)

    def apply(self, left: int, right: int, symbol: int, places: np.ndarray, count: int) -> None:
        """Replace the pair by a symbol at the given places and register the pairs that this creates."""
        symbols, following, preceding = self.symbols, self.following, self.preceding
        second = following[places]
        after = following[second]
        symbols[places] = symbol
        symbols[second] = _GONE
        following[places] = after
        preceding[after] = places
        counts = self.symbol_counts
        counts[left] -= count
        counts[right] -= count
        counts[symbol] = counts.get(symbol, 0) + count
        self.total -= count
        before = preceding[places]
        before_symbols, after_symbols = symbols[before], symbols[after]
        # A pair of two new symbols is seen from both sides: it is counted from its left one only.
        from_left = (before_symbols >= 0) & (before_symbols != symbol)
        for key, group, weight in self._groups(before_symbols[from_left], before[from_left]):
            self._add(key, symbol, group, weight)
        to_right = after_symbols >= 0
        for key, group, weight in self._groups(after_symbols[to_right], places[to_right]):
            self._add(symbol, key, group, weight)


def learn_merges(
    merger: PairMerger,
    wanted: int,
    forbidden: Callable[[str], bool],
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, int, int]]:
    """Up to `wanted` merges with new texts, best first: (left, right, new symbol).

    Symbols are numbered on from the highest one there is. A pair that spells a known text becomes that text's
    symbol and is not counted among the merges; a pair whose text is `forbidden` is passed over.
    """
    merges: list[tuple[int, int, int]] = []
    next_symbol = max(merger.texts) + 1
    while len(merges) < wanted:
        best = merger.pop()
        if best is None:
            break
        left, right, places, count = best
        text = merger.texts[left] + merger.texts[right]
        symbol = merger.ids.get(text)
        if symbol is None:
            if forbidden(text):
                continue
            symbol = next_symbol
            next_symbol += 1
            merger.texts[symbol] = text
            merger.ids[text] = symbol
            merges.append((left, right, symbol))
            if progress is not None and len(merges) % 256 == 0:
                progress(len(merges), wanted)
        merger.apply(left, right, symbol, places, count)
    return merges
