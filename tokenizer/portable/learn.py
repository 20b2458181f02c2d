"""Learn a portable vocabulary: byte-pair encoding, then whole words instead of merges that are not worth an entry.

Many merges of byte-pair encoding are only steps to a longer word (" Pri", " Prim", then " Prime"). Here a whole word is
found without its steps. So more merges are learned than requested; those that save the fewest tokens are removed,
together with the merges made of them, and the words among these remain as base tokens.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np

from tokenizer.encoding.unicode import text_to_bytes
from tokenizer.learning.merges import SEPARATOR, PairMerger
from tokenizer.learning.options import LearnOptions, ProgressCallback
from tokenizer.learning.training_words import thin_out
from tokenizer.portable.batch import BatchMerger
from tokenizer.vocabulary import (
    FIRST_BYTE,
    FIRST_LEARNED,
    MAX_ENTRIES,
    MAX_PORTABLE_ENTRY,
    PORTABLE_PATTERN,
    Vocabulary,
    first_entry_id,
)

_OVERSHOOT = 1.1
"""Merges learned per entry that is kept."""
_ROUNDS = 2
"""Times that entries are removed; their uses are counted again before each."""
_WORD_VALUE = 2
"""Tokens that a base token saves, roughly, at each of its uses, compared with the removal of a last merge."""

Pair = tuple[bytes, bytes]


def learn_portable(counts: dict[str, int], options: LearnOptions, progress: ProgressCallback | None) -> Vocabulary:
    """Learn a portable vocabulary; deterministic in the counts and options, independent of the order of `counts`.

    Args:
        counts: {pre-token: count}.
        options: Size and kind of the vocabulary.
        progress: Called as progress(description, done, total).
    """
    thinned = thin_out(Counter(counts))
    words = {text_to_bytes(word): count for word, count in sorted(thinned.items())}
    capacity = (MAX_ENTRIES if options.vocab_size is None else options.vocab_size) - options.first_entry
    fixed: list[bytes] = []
    if options.k_bases is not None:
        fixed = _most_common_words(words, min(capacity, options.k_bases), options.min_freq)
        capacity -= len(fixed)
    if options.max_merges is not None:
        capacity = min(capacity, options.max_merges)
    others = {word: count for word, count in words.items() if word not in set(fixed)}
    overshoot = 1.0 if fixed else _OVERSHOOT
    entries = Entries(_learn_merges(others, int(capacity * overshoot), options, progress), fixed)
    if options.k_bases is None:
        start = len(entries.pairs)
        for round_ in range(1, _ROUNDS + 1):
            entries.shrink(words, start - (start - min(start, capacity)) * round_ // _ROUNDS, options.min_freq)
        free = capacity - len(entries.pairs) - len(entries.bases)
        known = {*entries.pairs, *entries.bases}
        rest = {word: count for word, count in words.items() if word not in known}
        entries.bases += _most_common_words(rest, max(0, free), options.min_freq)
    return entries.to_vocabulary(words, options)


def _most_common_words(words: dict[bytes, int], limit: int, min_count: int) -> list[bytes]:
    """Return the most common words of two bytes or more that are text and can be an entry."""
    candidates = [
        (-count, word)
        for word, count in words.items()
        if count >= min_count and 1 < len(word) <= MAX_PORTABLE_ENTRY and _is_text(word)
    ]
    return [word for _, word in sorted(candidates)[:limit]]


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _learn_merges(
    words: dict[bytes, int], max_merges: int, options: LearnOptions, progress: ProgressCallback | None
) -> dict[bytes, Pair]:
    """Return {bytes: (left bytes, right bytes)} of up to `max_merges` merges, in the order of learning."""
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    flat = np.frombuffer(b"".join(words), dtype=np.uint8)
    # One separator before the first word and one after each word.
    positions = np.arange(1, len(flat) + 1) + np.repeat(np.arange(len(lengths)), lengths)
    symbols = np.full(len(flat) + len(lengths) + 1, SEPARATOR, dtype=np.int32)
    symbols[positions] = flat.astype(np.int32) + FIRST_BYTE
    weights = np.zeros(len(symbols), dtype=np.int64)
    weights[positions] = np.repeat(np.array(list(words.values()), dtype=np.int64), lengths)
    report = None if progress is None else partial(progress, "merges")
    # A threshold well below the count of the last merge keeps rare pairs out of the heap; lowered if it was too high.
    min_count = max(options.min_freq, int(weights.sum()) // (40 * max(1, max_merges)))
    if options.score == "pmi":  # prefers rare pairs
        min_count = options.min_freq
    while True:
        texts = {FIRST_BYTE + value: chr(value) for value in range(256)}  # bytes as Latin-1 text
        merger = PairMerger(symbols.copy(), weights, texts, options.score, min_count)
        merges = _apply_merges(merger, max_merges, report)
        if len(merges) >= max_merges or min_count == options.min_freq:
            return merges
        min_count = max(options.min_freq, min_count // 8)


def _apply_merges(merger: PairMerger, max_merges: int, report: partial[None] | None) -> dict[bytes, Pair]:
    """Apply the best merges one after another.

    A pair that spells a known entry is left alone: each entry has one merge, so that ranks are those of the entries.
    """
    merges: dict[bytes, Pair] = {}
    while len(merges) < max_merges:
        best = merger.pop()
        if best is None:
            break
        left = merger.texts[best.left]
        right = merger.texts[best.right]
        text = left + right
        if text in merger.ids or len(text) > MAX_PORTABLE_ENTRY:
            continue
        symbol = FIRST_BYTE + 256 + len(merges)
        merger.texts[symbol] = text
        merger.ids[text] = symbol
        merges[text.encode("latin-1")] = (left.encode("latin-1"), right.encode("latin-1"))
        merger.apply(best, symbol)
        if report is not None and len(merges) % 256 == 0:
            report(len(merges), max_merges)
    return merges


class Entries:
    """Merges and base tokens while they are chosen.

    Attributes:
        pairs: {bytes: (left bytes, right bytes)} of the merges, in the order of their ranks.
        bases: Words that no merges make.
    """

    def __init__(self, pairs: dict[bytes, Pair], bases: list[bytes]) -> None:
        self.pairs = pairs
        self.bases = [word for word in bases if word not in pairs]

    def shrink(self, words: dict[bytes, int], size: int, min_count: int) -> None:
        """Remove the entries that save the fewest tokens on the words until `size` are left.

        The loss of a merge is the uses of its entry, and the uses within words of everything that is made of it.
        """
        excess = len(self.pairs) + len(self.bases) - size
        if excess <= 0:
            return
        whole, inner = self._uses(words)
        children: dict[bytes, list[bytes]] = {}
        for data, pair in self.pairs.items():
            for part in set(pair):
                children.setdefault(part, []).append(data)
        loss: dict[bytes, int] = {}
        for data in reversed(self.pairs):
            loss[data] = inner[data] + sum(loss[child] for child in children.get(data, ()))
        uses = sorted(whole[data] + inner[data] for data in self.pairs)
        threshold = max(min_count, uses[min(excess, len(uses) - 1)] // _WORD_VALUE)
        candidates = [(whole[data], data) for data in self.bases]
        candidates += [(loss[data] + whole[data], data) for data in self.pairs]
        removed: set[bytes] = set()
        bases = set(self.bases)
        for _, data in sorted(candidates):
            if excess <= 0:
                break
            if data in bases:
                bases.discard(data)
                excess -= 1
                continue
            for member in self._remove(data, children, removed):
                if member != data and whole[member] > threshold and _is_text(member):
                    bases.add(member)
                else:
                    excess -= 1
        self.bases = sorted(bases)
        self.pairs = {data: pair for data, pair in self.pairs.items() if data not in removed}

    def _remove(self, data: bytes, children: dict[bytes, list[bytes]], removed: set[bytes]) -> list[bytes]:
        """Mark a merge and all that are made of it as removed; return those that were not before."""
        members = []
        pending = [data]
        while pending:
            member = pending.pop()
            if member not in removed:
                removed.add(member)
                members.append(member)
                pending += children.get(member, ())
        return members

    def _uses(self, words: dict[bytes, int]) -> tuple[Counter[bytes], Counter[bytes]]:
        """Return how often each entry is a whole word, and how often it is a part of one."""
        known = {*self.pairs, *self.bases}
        whole = Counter({word: count for word, count in words.items() if word in known})
        others = [word for word in words if word not in known and len(word) > 1]
        vocabulary = self._number([])
        weights = np.array([words[word] for word in others], dtype=np.int64)
        uses = BatchMerger(vocabulary).usage(others, weights).tolist()
        return whole, Counter(dict(zip(vocabulary.data[FIRST_LEARNED:], uses[FIRST_LEARNED:], strict=True)))

    def _number(
        self, bases: list[bytes], byte_limit: int = 4, counts: tuple[int, ...] = (), turns: bool = False
    ) -> Vocabulary:
        first_merge = first_entry_id(False, turns) + len(bases)
        ids = {bytes([value]): FIRST_BYTE + value for value in range(256)}
        ids.update({data: first_merge + rank for rank, data in enumerate(self.pairs)})
        return Vocabulary(
            lowercase=False,
            byte_limit=byte_limit,
            bases=tuple(word.decode("utf-8") for word in bases),
            merges=tuple((ids[left], ids[right]) for left, right in self.pairs.values()),
            counts=counts,
            pattern=PORTABLE_PATTERN,
            turns=turns,
        )

    def to_vocabulary(self, words: dict[bytes, int], options: LearnOptions) -> Vocabulary:
        """Return the vocabulary: bases, the most used first, and merges by rank, with the uses of each on the words."""
        whole, inner = self._uses(words)
        bases = sorted(self.bases, key=lambda word: (-whole[word], word))
        counts = [whole[data] + inner[data] for data in (*bases, *self.pairs)]
        return self._number(bases, options.byte_limit, tuple(counts), options.turn_tokens)
