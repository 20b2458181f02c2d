"""Phrases: entries that span words, learned from running text that is already encoded.

A second stage of pair merging on top of the first, without its borders, as in SuperBPE (Liu et al., 2025); pairs
are taken many at a time, and what is hardly used by the encoder in the end is dropped again.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tokenizer.encoding.encoder import Encoder
from tokenizer.encoding.phrases import PhraseJoiner
from tokenizer.units import capitalised
from tokenizer.vocabulary import MAX_PHRASE, RESERVED_NAMES, PhraseTable, Vocabulary

_ROUNDS = 10
_OVERSHOOT = 1.2
_MOST_IDS = 8
"""Ids that one phrase joins at most."""
_BORDER = -1


def with_phrases(vocabulary: Vocabulary, sample: list[str], wanted: int, min_freq: int, anywhere: bool) -> Vocabulary:
    """The vocabulary with up to `wanted` phrases learned from the texts of `sample`.

    `anywhere`: neighbours of any kind may be joined; else what is joined begins with white space.
    """
    encoder = Encoder(vocabulary)
    rows = [np.frombuffer(encoder.ids(text), dtype=np.int32) for text in sorted(sample)]
    border = np.array([_BORDER], dtype=np.int32)
    stream = np.concatenate([array for row in rows for array in (row, border)])
    learner = _Learner(vocabulary, stream, min_freq, anywhere)
    most = int(wanted * _OVERSHOOT)
    for _ in range(_ROUNDS * 4):
        if len(learner.pairs) >= most or not learner.step(min(most - len(learner.pairs), most // _ROUNDS + 1)):
            break
    return learner.select(stream, wanted)


class _Learner:
    """Symbols are ids, and behind those the phrases in the order in which they were found."""

    def __init__(self, vocabulary: Vocabulary, stream: np.ndarray, min_freq: int, anywhere: bool) -> None:
        self.vocabulary = vocabulary
        self.stream = stream
        self.min_freq = min_freq
        self.anywhere = anywhere
        self.texts = list(vocabulary.texts)
        self.known = set(self.texts) | RESERVED_NAMES
        self.sizes = [1] * len(self.texts)
        self.pairs: list[tuple[int, int]] = []

    def _usable(self) -> tuple[np.ndarray, np.ndarray]:
        """(may stand left, may stand right) of each symbol."""
        left = np.array([bool(text) for text in self.texts] + [False])  # the last is _BORDER
        right = left.copy()
        if not self.anywhere:
            right[:-1] = [text[:1] == "\n" or (text[:1] == " " and text[1:2] not in ("", " ")) for text in self.texts]
        if self.vocabulary.lowercase:
            left[self.vocabulary.up] = True
        return left, right

    def step(self, wanted: int) -> bool:
        """Find up to `wanted` more phrases and join them in the stream; False when there are none."""
        may_left, may_right = self._usable()
        stream = self.stream
        usable = may_left[stream[:-1]] & may_right[stream[1:]]
        usable[1:] &= stream[:-2] != (self.vocabulary.caps if self.vocabulary.lowercase else -2)
        places = np.flatnonzero(usable)
        keys = stream[places].astype(np.int64) << 32 | stream[places + 1]
        pairs, counts = np.unique(keys, return_counts=True)
        frequent = counts >= self.min_freq
        pairs, counts = pairs[frequent], counts[frequent]
        chosen: list[int] = []
        first = len(self.texts)
        for key in pairs[np.lexsort((pairs, -counts))].tolist():
            if len(chosen) == wanted:
                break
            if self._accept(key >> 32, key & 0xFFFFFFFF):
                chosen.append(key)
        if not chosen:
            return False
        order = np.argsort(chosen)
        chosen_sorted = np.array(chosen)[order]
        at = np.minimum(np.searchsorted(chosen_sorted, keys), len(chosen) - 1)
        hit = chosen_sorted[at] == keys
        self._replace(places[hit], (first + order[at[hit]]).astype(np.int32))
        return True

    def _accept(self, left: int, right: int) -> bool:
        if left == self.vocabulary.up:
            text = capitalised(self.texts[right], self.vocabulary.pairs)
        else:
            text = self.texts[left] + self.texts[right]
        size = self.sizes[left] + self.sizes[right]
        if text in self.known or len(text) > MAX_PHRASE or size > _MOST_IDS:
            return False
        self.known.add(text)
        self.texts.append(text)
        self.sizes.append(size)
        self.pairs.append((left, right))
        return True

    def _replace(self, places: np.ndarray, symbols: np.ndarray) -> None:
        """Join at the places; where several places are neighbours, every second one from the left."""
        index = np.arange(len(places))
        run_start = np.maximum.accumulate(np.where(np.diff(places, prepend=-2) != 1, index, 0))
        kept = (index - run_start) % 2 == 0
        stream = self.stream.copy()
        stream[places[kept]] = symbols[kept]
        alive = np.ones(len(stream), dtype=bool)
        alive[places[kept] + 1] = False
        self.stream = stream[alive]

    def select(self, stream: np.ndarray, wanted: int) -> Vocabulary:
        """The vocabulary with the phrases that the encoder uses most, and those they are made of."""
        vocabulary = replace(self.vocabulary, phrases=tuple(self.pairs))
        if not self.pairs:
            return vocabulary
        joined = _join(vocabulary.phrase_table, vocabulary.caps, stream)
        used = np.bincount(joined, minlength=vocabulary.size)[: vocabulary.size]  # less the border
        first = vocabulary.first_phrase
        kept: set[int] = set()
        for id_ in (first + np.lexsort((np.arange(len(self.pairs)), -used[first:]))).tolist():
            family = self._family(id_) - kept
            if len(kept) + len(family) <= wanted:
                kept |= family
        number = {id_: first + index for index, id_ in enumerate(sorted(kept))}
        phrases = tuple(
            (number.get(left, left), number.get(right, right))
            for left, right in (self.pairs[id_ - first] for id_ in sorted(kept))
        )
        counts = used[[*range(vocabulary.first_entry, first), *sorted(kept)]].tolist()
        return replace(self.vocabulary, phrases=phrases, counts=tuple(counts))

    def _family(self, id_: int) -> set[int]:
        """A phrase and the phrases it is made of."""
        first = self.vocabulary.first_phrase
        if id_ < first:
            return set()
        left, right = self.pairs[id_ - first]
        return {id_} | self._family(left) | self._family(right)


def _join(table: PhraseTable, caps: int, stream: np.ndarray) -> np.ndarray:
    border = max(table.sequences.values()) + 1  # a code point that begins no phrase
    return PhraseJoiner(table, caps).join(np.where(stream == _BORDER, border, stream).astype(np.int32))
