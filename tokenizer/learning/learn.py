"""Learn a vocabulary from counted pre-tokens: alphabet, base tokens, merges and, on request, phrases.

The steps of `learn_vocabulary`: split the pre-tokens into words, fold their case, choose the alphabet and the base
tokens, learn more merges than requested, add capitalized words, prune to the requested size by use, number the entries,
and learn phrases on top.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial

import numpy as np

from tokenizer.encoding.batch import BatchSegmenter
from tokenizer.encoding.unicode import capitalize, find_case_pairs
from tokenizer.learning.merges import SEPARATOR, PairMerger, learn_merges
from tokenizer.learning.options import LearnOptions, ProgressCallback
from tokenizer.learning.phrases import learn_phrases
from tokenizer.learning.pruning import EntryGraph
from tokenizer.learning.training_words import count_words, fold_case, split_and_thin
from tokenizer.vocabulary import (
    CASE_MARKS,
    FIRST_BYTE,
    FIRST_LEARNED,
    MAX_ENTRIES,
    MAX_ENTRY,
    NL,
    RESERVED_NAMES,
    SP,
    Vocabulary,
)

_OVERSHOOT = 1.1
"""Entries learned per entry that is kept."""
_FOUR_DIGITS = re.compile("[0-9]{4}")


def learn_vocabulary(
    counts: dict[str, int], sample: list[str], options: LearnOptions, progress: ProgressCallback | None = None
) -> Vocabulary:
    """Learn a vocabulary.

    Deterministic in the counts and options, independent of the order of `counts` and `sample`.

    Args:
        counts: {pre-token: count}.
        sample: Running text, from which phrases are learned.
        options: Size and kind of the vocabulary.
        progress: Called as progress(description, done, total).
    """
    if options.portable:
        from tokenizer.portable.learn import learn_portable  # compiles patterns, which others do not need

        return learn_portable(counts, options, progress)
    if not options.phrase_count:
        return _learn_entries(counts, options, progress)
    vocabulary = _learn_entries(counts, options.without_phrases(), progress)
    across_punctuation = options.boundaries == "spaces"
    return learn_phrases(vocabulary, sample, options.phrase_count, options.min_freq, across_punctuation)


def _learn_entries(counts: dict[str, int], options: LearnOptions, progress: ProgressCallback | None) -> Vocabulary:
    """Learn everything except the phrases."""
    pretokens = split_and_thin(counts)
    cased_words = count_words(pretokens, options.boundaries)
    words = cased_words
    pairs: dict[str, str] = {}
    if options.lowercase:
        letters = {letter.lower() for letter in set("".join(words))}
        pairs = find_case_pairs({letter for letter in letters if len(letter) == 1})
        words = fold_case(words, pairs)
    capacity = MAX_ENTRIES if options.vocab_size is None else options.vocab_size
    capacity -= options.first_entry
    symbols = TrainingSymbols(words, min(capacity // 2, 1 << 16), options.min_freq)
    fixed_bases: list[str] = []
    if options.k_bases is not None:
        fixed_bases = choose_bases(words, min(capacity, options.k_bases), options.byte_limit, options.min_freq)
    capacity -= len(fixed_bases)
    if options.max_merges is not None:
        capacity = min(capacity, options.max_merges + len(symbols.alphabet))
    merged = _learn_merges(symbols, int(capacity * _OVERSHOOT), options, progress)
    cased = _cased_entries(cased_words, {*merged, *fixed_bases}, pairs, capacity // 3, options.min_freq)
    graph = EntryGraph(
        fixed=[chr(value) for value in range(128)] + fixed_bases,
        single=symbols.alphabet,
        composed={*merged, *cased} - set(fixed_bases),
        pairs=pairs,
    )
    uses = _prune(graph, fixed_bases, pretokens, capacity, pairs, options)
    bases = fixed_bases
    if options.k_bases is None:
        short_words = set(choose_bases(cased_words, MAX_ENTRIES, options.byte_limit, options.min_freq))
        bases = [text for text in graph.composed if text in short_words and graph.case_mark_and_entry(text) is None]
    return number_entries(graph, bases, uses, pairs, options)


class TrainingSymbols:
    """The training words as an array of symbols: ASCII characters, then alphabet characters numbered from `first`.

    Attributes:
        alphabet: Characters beyond ASCII that become entries.
        symbols: int32 [N], with `SEPARATOR` between words, at both ends, and for characters without a symbol.
        weights: int64 [N]; how often the word at each position occurs.
    """

    def __init__(self, words: Counter[str], alphabet_limit: int, min_count: int) -> None:
        ordered = sorted(words)
        self.first = FIRST_LEARNED + len(CASE_MARKS)
        counts = np.array([words[word] for word in ordered], dtype=np.int64)
        lengths = np.array([len(word) for word in ordered], dtype=np.int64)
        codes = np.frombuffer("".join(ordered).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        weights = np.repeat(counts, lengths)
        self.alphabet = self._choose_alphabet(codes, weights, alphabet_limit, min_count)
        symbol_of = np.full(0x110000, SEPARATOR, dtype=np.int32)
        symbol_of[:128] = np.arange(FIRST_BYTE, FIRST_BYTE + 128)
        symbol_of[[32, 10]] = SP, NL
        symbol_of[[ord(letter) for letter in self.alphabet]] = np.arange(self.first, self.first + len(self.alphabet))
        # One separator before the first word and one after each word.
        positions = np.arange(1, len(codes) + 1) + np.repeat(np.arange(len(lengths)), lengths)
        self.symbols = np.full(len(codes) + len(lengths) + 1, SEPARATOR, dtype=np.int32)
        self.symbols[positions] = symbol_of[codes]
        self.weights = np.zeros(len(self.symbols), dtype=np.int64)
        self.weights[positions] = weights

    @staticmethod
    def _choose_alphabet(codes: np.ndarray, weights: np.ndarray, limit: int, min_count: int) -> list[str]:
        """Return the characters beyond ASCII that save the most byte tokens, at most `limit`; never surrogates."""
        totals = np.bincount(codes, weights=weights, minlength=128).astype(np.int64)
        points = np.flatnonzero(totals >= min_count)
        points = points[(points >= 128) & ((points < 0xD800) | (points > 0xDFFF))]
        saved = totals[points] * (1 + (points > 0x7FF) + (points > 0xFFFF))
        best = np.lexsort((points, -saved))[:limit]
        return [chr(point) for point in points[best]]

    def texts(self) -> dict[int, str]:
        """Return {symbol: text} of the symbols before any merge."""
        texts = {FIRST_BYTE + value: chr(value) for value in range(128) if value not in (10, 32)}
        texts[SP] = " "
        texts[NL] = "\n"
        texts.update({self.first + index: letter for index, letter in enumerate(self.alphabet)})
        return texts


def choose_bases(words: Counter[str], limit: int, byte_limit: int, min_count: int) -> list[str]:
    """Return the most common words of at most `byte_limit` UTF-8 bytes, not counting their leading space.

    Words of one character are never bases: characters have entries of their own.
    """
    candidates = []
    for word, count in words.items():
        if len(word) > byte_limit + 1:
            continue
        bare = word[1:] if word[:1] == " " else word
        if count >= min_count and len(word) > 1 and bare.strip() and bare not in RESERVED_NAMES:
            size = len(bare.encode("utf-8", "surrogatepass"))
            if size <= byte_limit and not any("\ud800" <= letter <= "\udfff" for letter in bare):
                candidates.append((-count, word))
    return [word for _, word in sorted(candidates)[:limit]]


def _is_forbidden(text: str) -> bool:
    """Return whether a text must not be an entry: too long, a reserved name, or more than three digits in a row."""
    return len(text) > MAX_ENTRY or text in RESERVED_NAMES or _FOUR_DIGITS.search(text) is not None


def _learn_merges(
    symbols: TrainingSymbols, max_merges: int, options: LearnOptions, progress: ProgressCallback | None
) -> list[str]:
    """Return the texts of up to `max_merges` merges."""
    report = None if progress is None else partial(progress, "merges")
    # A threshold well below the count of the last merge keeps rare pairs out of the heap; lowered if it was too high.
    min_count = max(options.min_freq, int(symbols.weights.sum()) // (40 * max(1, max_merges)))
    if options.score == "pmi":  # prefers rare pairs
        min_count = options.min_freq
    while True:
        merger = PairMerger(symbols.symbols.copy(), symbols.weights, symbols.texts(), options.score, min_count)
        merged = learn_merges(merger, max_merges, _is_forbidden, report)
        if len(merged) >= max_merges or min_count == options.min_freq:
            return merged
        min_count = max(options.min_freq, min_count // 8)


def _cased_entries(
    cased_words: Counter[str], entries: set[str], pairs: dict[str, str], limit: int, min_count: int
) -> list[str]:
    """Return the most common words with upper-case letters whose lower-case form is an entry: " The", " I"."""
    if not pairs:
        return []
    lower = {ord(big): small for small, big in pairs.items()}
    upper = {ord(small): big for small, big in pairs.items()}
    candidates = []
    for word, count in cased_words.items():
        small = word.translate(lower)
        if small == word or small not in entries or count < min_count or _is_forbidden(word):
            continue
        if word in (capitalize(small, pairs), small.translate(upper)):
            candidates.append((-count, word))
    return [word for _, word in sorted(candidates)[:limit]]


def _prune(
    graph: EntryGraph,
    fixed_bases: list[str],
    pretokens: Counter[str],
    size: int,
    pairs: dict[str, str],
    options: LearnOptions,
) -> dict[str, int]:
    """Shrink the entries to `size` by their use on the pre-tokens; return {text: uses} measured before."""
    ordered = sorted(pretokens)
    weights = np.array([pretokens[pretoken] for pretoken in ordered], dtype=np.int64)
    vocabulary = number_entries(graph, fixed_bases, {}, pairs, options)
    first = vocabulary.first_entry
    counts = BatchSegmenter(vocabulary).usage(ordered, weights).tolist()
    uses = dict(zip(vocabulary.texts[first:], counts[first:], strict=True))
    saved = {}
    for text, count in uses.items():
        # Without its entry, a character costs its bytes; every other entry saves at least one token.
        tokens_saved = len(text.encode()) - 1 if len(text) == 1 else 1
        saved[text] = count * tokens_saved
    graph.shrink(saved, size)
    return uses


def number_entries(
    graph: EntryGraph, bases: list[str], uses: dict[str, int], pairs: dict[str, str], options: LearnOptions
) -> Vocabulary:
    """Assign ids: alphabet, bases, then merges, the most used first but parents before children."""

    def by_use(text: str) -> tuple[int, int, str]:
        return -uses.get(text, 0), len(text), text

    alphabet = sorted(graph.single, key=by_use)
    bases = sorted(bases, key=by_use)
    ids: dict[str, int] = {chr(value): FIRST_BYTE + value for value in range(128)}
    ids[" "] = SP
    ids["\n"] = NL
    first_merge = options.first_entry
    for text in [*alphabet, *bases]:
        ids[text] = first_merge
        first_merge += 1
    for offset, mark in enumerate(CASE_MARKS):
        ids[mark] = FIRST_LEARNED + offset
    merges: list[tuple[int, int]] = []

    def add(text: str) -> int:
        if text not in ids:
            parents = graph.parents(text)
            assert parents is not None
            left = add(parents[0])
            right = add(parents[1])
            ids[text] = first_merge + len(merges)
            merges.append((left, right))
        return ids[text]

    for text in sorted(graph.composed, key=by_use):
        add(text)
    learned = sorted((id_, text) for text, id_ in ids.items() if id_ >= FIRST_LEARNED and text not in CASE_MARKS)
    return Vocabulary(
        lowercase=options.lowercase,
        byte_limit=options.byte_limit,
        alphabet=tuple(alphabet),
        bases=tuple(bases),
        merges=tuple(merges),
        pairs=pairs,
        counts=tuple(uses.get(text, 0) for _, text in learned),
        turns=options.turn_tokens,
    )
