"""Learn phrases: entries that span words, from running text that is already encoded.

A second stage of pair merging on top of the first, without its boundaries, as in SuperBPE (Liu et al., 2025). Many
pairs are merged per round, and phrases that the encoder hardly uses in the end are dropped.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tokenizer.encoding.encoder import Encoder
from tokenizer.encoding.phrases import PhraseJoiner
from tokenizer.encoding.unicode import capitalize
from tokenizer.vocabulary import MAX_PHRASE, RESERVED_NAMES, PhraseTable, Vocabulary

_ROUNDS = 10
"""Rounds in which the phrases are found if every round finds all it may."""
_MAX_ROUNDS = 40
_OVERSHOOT = 1.2
"""Phrases learned per phrase that is kept."""
_MAX_IDS = 8
"""Maximum number of ids that one phrase joins."""
_SEPARATOR = -1


def learn_phrases(
    vocabulary: Vocabulary, sample: list[str], max_phrases: int, min_count: int, across_punctuation: bool
) -> Vocabulary:
    """Learn phrases and return the vocabulary extended by them.

    Args:
        vocabulary: A vocabulary without phrases.
        sample: Running text to learn from.
        max_phrases: Number of phrases to learn; fewer are learned if the text does not contain as many.
        min_count: Occurrences that a phrase needs.
        across_punctuation: Join neighbors of any kind; otherwise, the right one must start with white space.
    """
    encoder = Encoder(vocabulary)
    separator = np.array([_SEPARATOR], dtype=np.int32)
    rows = []
    for text in sorted(sample):
        rows.append(np.frombuffer(encoder.ids(text), dtype=np.int32))
        rows.append(separator)
    stream = np.concatenate(rows)
    learner = _PhraseLearner(vocabulary, stream, min_count, across_punctuation)
    wanted = int(max_phrases * _OVERSHOOT)
    for _ in range(_MAX_ROUNDS):
        missing = wanted - len(learner.pairs)
        if missing <= 0 or not learner.step(min(missing, wanted // _ROUNDS + 1)):
            break
    return learner.select(stream, max_phrases)


class _PhraseLearner:
    """The state of one training. Symbols are ids, followed by the phrases in the order in which they were found."""

    def __init__(self, vocabulary: Vocabulary, stream: np.ndarray, min_count: int, across_punctuation: bool) -> None:
        self.vocabulary = vocabulary
        self.stream = stream
        self.min_count = min_count
        self.across_punctuation = across_punctuation
        self.texts = list(vocabulary.texts)
        self.known = set(self.texts) | RESERVED_NAMES
        self.sizes = [1] * len(self.texts)
        self.pairs: list[tuple[int, int]] = []

    def step(self, max_new: int) -> bool:
        """Find up to `max_new` phrases and join them in the stream; return False if there are none."""
        positions = self._joinable_positions()
        stream = self.stream
        keys = stream[positions].astype(np.int64) << 32 | stream[positions + 1]
        pairs, counts = np.unique(keys, return_counts=True)
        frequent = counts >= self.min_count
        pairs = pairs[frequent]
        counts = counts[frequent]
        first_new = len(self.texts)
        chosen: list[int] = []
        for key in pairs[np.lexsort((pairs, -counts))].tolist():
            if len(chosen) == max_new:
                break
            if self._accept(key >> 32, key & 0xFFFFFFFF):
                chosen.append(key)
        if not chosen:
            return False
        order = np.argsort(chosen)
        sorted_keys = np.array(chosen)[order]
        index = np.minimum(np.searchsorted(sorted_keys, keys), len(chosen) - 1)
        hit = sorted_keys[index] == keys
        self._replace(positions[hit], (first_new + order[index[hit]]).astype(np.int32))
        return True

    def _joinable_positions(self) -> np.ndarray:
        """Return the positions whose symbol may be joined with the next one, int64 [n]."""
        may_be_left = np.array([bool(text) for text in self.texts] + [False])  # the last one is _SEPARATOR
        may_be_right = may_be_left.copy()
        if not self.across_punctuation:
            may_be_right[:-1] = [
                text[:1] == "\n" or (text[:1] == " " and text[1:2] not in ("", " ")) for text in self.texts
            ]
        if self.vocabulary.lowercase:
            may_be_left[self.vocabulary.up] = True
        stream = self.stream
        joinable = may_be_left[stream[:-1]] & may_be_right[stream[1:]]
        if self.vocabulary.lowercase:
            joinable[1:] &= stream[:-2] != self.vocabulary.caps  # <CAPS> applies to one token
        return np.flatnonzero(joinable)

    def _accept(self, left: int, right: int) -> bool:
        """Register a pair as a phrase unless it is too long or its text is known."""
        if left == self.vocabulary.up:
            text = capitalize(self.texts[right], self.vocabulary.pairs)
        else:
            text = self.texts[left] + self.texts[right]
        size = self.sizes[left] + self.sizes[right]
        if text in self.known or len(text) > MAX_PHRASE or size > _MAX_IDS:
            return False
        self.known.add(text)
        self.texts.append(text)
        self.sizes.append(size)
        self.pairs.append((left, right))
        return True

    def _replace(self, positions: np.ndarray, symbols: np.ndarray) -> None:
        """Join at the positions; of adjacent positions, at every second one from the left."""
        index = np.arange(len(positions))
        run_start = np.maximum.accumulate(np.where(np.diff(positions, prepend=-2) != 1, index, 0))
        kept = (index - run_start) % 2 == 0
        stream = self.stream.copy()
        stream[positions[kept]] = symbols[kept]
        alive = np.ones(len(stream), dtype=bool)
        alive[positions[kept] + 1] = False
        self.stream = stream[alive]

    def select(self, stream: np.ndarray, max_phrases: int) -> Vocabulary:
        """Return the vocabulary with the phrases that the encoder uses most and the phrases they are made of."""
        vocabulary = replace(self.vocabulary, phrases=tuple(self.pairs))
        if not self.pairs:
            return vocabulary
        joined = _join(vocabulary.phrase_table, vocabulary.caps, stream)
        uses = np.bincount(joined, minlength=vocabulary.size)[: vocabulary.size]  # without the separator
        first = vocabulary.first_phrase
        kept: set[int] = set()
        for id_ in (first + np.lexsort((np.arange(len(self.pairs)), -uses[first:]))).tolist():
            family = self._family(id_) - kept
            if len(kept) + len(family) <= max_phrases:
                kept |= family
        new_ids = {id_: first + index for index, id_ in enumerate(sorted(kept))}
        phrases = []
        for id_ in sorted(kept):
            left, right = self.pairs[id_ - first]
            phrases.append((new_ids.get(left, left), new_ids.get(right, right)))
        counts = uses[[*range(vocabulary.first_entry, first), *sorted(kept)]].tolist()
        return replace(self.vocabulary, phrases=tuple(phrases), counts=tuple(counts))

    def _family(self, id_: int) -> set[int]:
        """Return a phrase and all phrases it is made of."""
        first = self.vocabulary.first_phrase
        if id_ < first:
            return set()
        left, right = self.pairs[id_ - first]
        return {id_} | self._family(left) | self._family(right)


def _join(table: PhraseTable, caps: int, stream: np.ndarray) -> np.ndarray:
    separator = max(table.sequences.values()) + 1  # a code point that starts no phrase
    return PhraseJoiner(table, caps).join(np.where(stream == _SEPARATOR, separator, stream).astype(np.int32))
