"""From counted keys to a vocabulary: alphabet, base tokens, merges and, when asked for, phrases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tokenizer.encoding.batch import BatchSegmenter
from tokenizer.errors import TokenizerError
from tokenizer.learning.learn_phrases import with_phrases
from tokenizer.learning.merges import BREAK, SCORES, PairMerger, learn_merges
from tokenizer.learning.prune import EntryGraph
from tokenizer.units import MAX_KEY, PUNCTUATION, capitalised, case_pairs, cut_long_key
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

Progress = Callable[[str, int, int], None]

_LETTER = rf"[^ \n\t\r0-9{PUNCTUATION}]"
# Merges grow inside of these. "words": a word with the space before it (an apostrophe inside belongs to it), up to
# three digits, punctuation, white space. "spaces": white space and all that follows it, up to a tab or carriage return.
BOUNDARIES = {
    "words": re.compile(
        rf"[ \n\t\r]+(?=[ ])|[ ]?(?:{_LETTER}|(?<={_LETTER})['’](?={_LETTER}))+"
        rf"|[ ]?[0-9]{{1,3}}|[ ]?(?![\t\r])[{PUNCTUATION}]+|[ \n\t\r]+"
    ),
    "spaces": re.compile(r"[ \n\t\r]*[^ \n\t\r]+|[ \n\t\r]+"),
}
_FOUR_DIGITS = re.compile("[0-9]{4}")


@dataclass(frozen=True)
class LearnOptions:
    """What `freeze_vocab` asks for, already checked: see there for the meaning."""

    lowercase: bool
    byte_limit: int
    vocab_size: int | None
    k_bases: int | None
    max_merges: int | None
    min_freq: int
    score: str
    phrases: float
    boundaries: str

    def without(self, phrases: int) -> LearnOptions:
        """The options for what is learned beside so many phrases."""
        size, merges = self.vocab_size, self.max_merges
        return replace(
            self,
            vocab_size=None if size is None else size - phrases,
            max_merges=None if merges is None else max(0, merges - phrases),
        )

    def check(self) -> None:
        """Raise TokenizerError when an option is impossible."""
        whole = {"vocab_size": self.vocab_size, "k_bases": self.k_bases, "max_merges": self.max_merges}
        whole["min_freq"] = self.min_freq
        least = {"vocab_size": FIRST_LEARNED + len(CASE_MARKS), "min_freq": 1}
        for name, value in whole.items():
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TokenizerError(f"{name} is {value!r}: it must be a whole number")
            if value < least.get(name, 0):
                why = ": special tokens, bytes and case marks alone need so many ids" if name == "vocab_size" else ""
                raise TokenizerError(f"{name} is {value}: it must be at least {least.get(name, 0)}{why}")
            if value > MAX_ENTRIES:
                raise TokenizerError(f"{name} is {value}: it must be at most {MAX_ENTRIES}")
        if self.score not in SCORES:
            raise TokenizerError(f"score is {self.score!r}: it must be one of {', '.join(SCORES)}")
        if self.boundaries not in BOUNDARIES:
            raise TokenizerError(f"boundaries is {self.boundaries!r}: it must be one of {', '.join(BOUNDARIES)}")
        if isinstance(self.phrases, bool) or not isinstance(self.phrases, int | float) or not 0 <= self.phrases <= 0.5:
            raise TokenizerError(f"phrases is {self.phrases!r}: it must be a share from 0 to 0.5")


def training_parts(keys: dict[str, int]) -> Counter[str]:
    """The counted keys, long ones cut; of very many, every fourth of those that occur once stands for four of them."""
    parts = Counter({key: count for key, count in keys.items() if len(key) <= MAX_KEY})
    for key, count in keys.items():
        if len(key) > MAX_KEY:
            for part in cut_long_key(key):
                parts[part] += count
    if len(parts) > _MANY_PARTS:
        single = sorted(part for part, count in parts.items() if count == 1)
        parts = Counter({part: count for part, count in parts.items() if count > 1})
        parts.update(dict.fromkeys(single[::4], 4))
    return parts


def training_words(parts: Counter[str], boundaries: str) -> Counter[str]:
    """The weighted words in which merges may grow."""
    words: Counter[str] = Counter()
    find = BOUNDARIES[boundaries].findall
    for part, count in parts.items():
        for word in find(part):
            words[word] += count
    return words


def fold_case(words: Counter[str], pairs: dict[str, str]) -> Counter[str]:
    """The words in lower case, cut before an upper-case letter inside of them."""
    if not pairs:
        return words
    lower = re.escape("".join(pairs))
    upper = re.escape("".join(pairs.values()))
    runs = re.compile(rf"[ \n]*[{upper}]+(?![{lower}])|[ \n]*[{upper}]?[^{upper}]+|[{upper}]+|[ \n]+")
    has_upper = re.compile(rf"[{upper}]").search
    table = {ord(big): small for small, big in pairs.items()}
    folded: Counter[str] = Counter()
    for word, count in words.items():
        if has_upper(word):
            for run in runs.findall(word):
                folded[run.translate(table)] += count
        else:
            folded[word] += count
    return folded


class Symbols:
    """The training words as symbols: ASCII characters, then alphabet characters numbered from `first`."""

    def __init__(self, words: Counter[str], alphabet_limit: int, floor: int) -> None:
        self.words = sorted(words)
        self.first = FIRST_LEARNED + len(CASE_MARKS)
        counts = np.array([words[word] for word in self.words], dtype=np.int64)
        lengths = np.array([len(word) for word in self.words], dtype=np.int64)
        codes = np.frombuffer("".join(self.words).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        weights = np.repeat(counts, lengths)
        self.alphabet = self._choose_alphabet(codes, weights, alphabet_limit, floor)
        symbol_of = np.full(0x110000, BREAK, dtype=np.int32)
        symbol_of[:128] = np.arange(FIRST_BYTE, FIRST_BYTE + 128)
        symbol_of[[32, 10]] = SP, NL
        symbol_of[[ord(letter) for letter in self.alphabet]] = np.arange(self.first, self.first + len(self.alphabet))
        places = np.arange(1, len(codes) + 1) + np.repeat(np.arange(len(lengths)), lengths)
        self.symbols = np.full(len(codes) + len(lengths) + 1, BREAK, dtype=np.int32)
        self.symbols[places] = symbol_of[codes]
        self.weights = np.zeros(len(self.symbols), dtype=np.int64)
        self.weights[places] = weights

    @staticmethod
    def _choose_alphabet(codes: np.ndarray, weights: np.ndarray, limit: int, floor: int) -> list[str]:
        """The characters beyond ASCII that save most bytes tokens, at most `limit`; surrogates are never among them."""
        totals = np.bincount(codes, weights=weights, minlength=128).astype(np.int64)
        points = np.flatnonzero(totals >= floor)
        points = points[(points >= 128) & ((points < 0xD800) | (points > 0xDFFF))]
        saved = totals[points] * (1 + (points > 0x7FF) + (points > 0xFFFF))
        best = np.lexsort((points, -saved))[:limit]
        return [chr(point) for point in points[best]]

    def texts(self) -> dict[int, str]:
        """{symbol: text} of the symbols there are before any merge."""
        texts = {FIRST_BYTE + value: chr(value) for value in range(128) if value not in (10, 32)}
        texts[SP], texts[NL] = " ", "\n"
        texts.update({self.first + index: letter for index, letter in enumerate(self.alphabet)})
        return texts


def choose_bases(words: Counter[str], limit: int, byte_limit: int, min_freq: int) -> list[str]:
    """The most common words of 2 to `byte_limit` bytes, their leading space not counted; at most `limit`."""
    found = []
    for word, count in words.items():
        if len(word) > byte_limit + 1:
            continue
        bare = word[1:] if word[:1] == " " else word
        if count >= min_freq and len(word) > 1 and bare.strip() and bare not in RESERVED_NAMES:
            size = len(bare.encode("utf-8", "surrogatepass"))
            if size <= byte_limit and not any("\ud800" <= letter <= "\udfff" for letter in bare):
                found.append((-count, word))
    return [word for _, word in sorted(found)[:limit]]


def _forbidden(text: str) -> bool:
    """Entries are not too long, not named like special tokens, and hold three digits in a row at most."""
    return len(text) > MAX_ENTRY or text in RESERVED_NAMES or _FOUR_DIGITS.search(text) is not None


OVERSHOOT = 1.1
"""Entries learned for each that is kept."""
_MANY_PARTS = 100_000
"""Different keys from which on a part of them is enough to learn from."""
_ROUNDS = (1.0,)
"""Sizes, relative to what is kept, between which the use of entries is measured anew."""


def learn_vocabulary(
    keys: dict[str, int], sample: list[str], options: LearnOptions, progress: Progress | None = None
) -> Vocabulary:
    """Learn a vocabulary from counted keys and, for phrases, a sample of the running text.

    Deterministic in the counts and options, whatever the order of `keys` and `sample`.
    """
    learned = sum(size or 0 for size in (options.vocab_size, -FIRST_LEARNED - len(CASE_MARKS)))
    if options.vocab_size is None:
        learned = options.max_merges or 0
    phrases = int(options.phrases * learned)
    vocabulary = _learn_entries(keys, options.without(phrases), progress)
    if not phrases:
        return vocabulary
    return with_phrases(vocabulary, sample, phrases, options.min_freq, anywhere=options.boundaries == "spaces")


def _learn_entries(keys: dict[str, int], options: LearnOptions, progress: Progress | None) -> Vocabulary:
    """Everything but the phrases."""
    parts = training_parts(keys)
    cased_words = training_words(parts, options.boundaries)
    pairs: dict[str, str] = {}
    words = cased_words
    if options.lowercase:
        letters = {letter.lower() for letter in set("".join(words))}
        pairs = case_pairs({letter for letter in letters if len(letter) == 1})
        words = fold_case(words, pairs)
    room = MAX_ENTRIES if options.vocab_size is None else options.vocab_size
    room -= FIRST_LEARNED + (len(CASE_MARKS) if options.lowercase else 0)
    symbols = Symbols(words, min(room // 2, 1 << 16), options.min_freq)
    fixed_bases: list[str] = []
    if options.k_bases is not None:
        fixed_bases = choose_bases(words, min(room, options.k_bases), options.byte_limit, options.min_freq)
    room -= len(fixed_bases)
    most = room if options.max_merges is None else min(room, options.max_merges + len(symbols.alphabet))
    merged = _merge(symbols, int(most * OVERSHOOT), options, progress)
    cased = _cased_entries(cased_words, {*merged, *fixed_bases}, pairs, most // 3, options.min_freq)
    graph = EntryGraph(
        [chr(value) for value in range(128)] + fixed_bases,
        symbols.alphabet,
        {*merged, *cased} - set(fixed_bases),
        pairs,
    )
    used = _select(graph, fixed_bases, parts, most, pairs, options)
    bases = fixed_bases
    if options.k_bases is None:
        whole = set(choose_bases(cased_words, MAX_ENTRIES, options.byte_limit, options.min_freq))
        bases = [text for text in graph.made if text in whole and graph.marked(text) is None]
    return assemble(graph, bases, used, pairs, options)


def _merge(symbols: Symbols, wanted: int, options: LearnOptions, progress: Progress | None) -> list[str]:
    """The texts of up to `wanted` merges."""
    report = None if progress is None else (lambda done, of: progress("merges", done, of))
    # A floor well below the count of the last merge keeps rare pairs out of the heap; it is lowered if it was too high.
    floor = max(options.min_freq, int(symbols.weights.sum()) // (40 * max(1, wanted)))
    if options.score == "pmi":
        floor = options.min_freq
    while True:
        merger = PairMerger(symbols.symbols.copy(), symbols.weights, symbols.texts(), options.score, floor)
        merges = learn_merges(merger, wanted, _forbidden, report)
        if len(merges) >= wanted or floor == options.min_freq:
            return [merger.texts[symbol] for _, _, symbol in merges]
        floor = max(options.min_freq, floor // 8)


def _cased_entries(
    cased_words: Counter[str], entries: set[str], pairs: dict[str, str], limit: int, min_freq: int
) -> list[str]:
    """The most common words with upper-case letters whose lower-case form is an entry: " The", " I"."""
    if not pairs:
        return []
    lower = {ord(upper): small for small, upper in pairs.items()}
    upper = {ord(small): big for small, big in pairs.items()}
    found = []
    for word, count in cased_words.items():
        small = word.translate(lower)
        if small == word or small not in entries or count < min_freq or _forbidden(word):
            continue
        if word in (capitalised(small, pairs), small.translate(upper)):
            found.append((-count, word))
    return [word for _, word in sorted(found)[:limit]]


def _select(
    graph: EntryGraph, fixed: list[str], parts: Counter[str], most: int, pairs: dict[str, str], options: LearnOptions
) -> dict[str, int]:
    """Shrink the entries to `most` by their use on the keys; return how often each remaining one was used."""
    ordered = sorted(parts)
    weights = np.array([parts[part] for part in ordered], dtype=np.int64)
    used: dict[str, int] = {}
    for size in _ROUNDS:
        vocabulary = assemble(graph, fixed, used, pairs, options)
        counts = BatchSegmenter(vocabulary).usage(ordered, weights).tolist()
        used = dict(zip(vocabulary.texts[vocabulary.first_entry :], counts[vocabulary.first_entry :], strict=True))
        saved = {text: count * (len(text.encode()) - 1 if len(text) == 1 else 1) for text, count in used.items()}
        graph.shrink(saved, int(most * size))
    return used


def assemble(
    graph: EntryGraph, bases: list[str], used: dict[str, int], pairs: dict[str, str], options: LearnOptions
) -> Vocabulary:
    """Number the entries: alphabet, bases, then merges, the most used first but parents before children."""

    def by_use(text: str) -> tuple[int, int, str]:
        return -used.get(text, 0), len(text), text

    alphabet, bases = sorted(graph.single, key=by_use), sorted(bases, key=by_use)
    ids: dict[str, int] = {chr(value): FIRST_BYTE + value for value in range(128)}
    ids[" "], ids["\n"] = SP, NL
    first = FIRST_LEARNED + (len(CASE_MARKS) if options.lowercase else 0)
    for text in [*alphabet, *bases]:
        ids[text] = first
        first += 1
    for offset, mark in enumerate(CASE_MARKS):
        ids[mark] = FIRST_LEARNED + offset
    merges: list[tuple[int, int]] = []

    def place(text: str) -> int:
        if text not in ids:
            parents = graph.parents(text)
            assert parents is not None
            left, right = place(parents[0]), place(parents[1])
            ids[text] = first + len(merges)
            merges.append((left, right))
        return ids[text]

    for text in sorted(graph.made, key=by_use):
        place(text)
    learned = sorted(((id_, text) for text, id_ in ids.items() if id_ >= FIRST_LEARNED and text not in CASE_MARKS))
    return Vocabulary(
        lowercase=options.lowercase,
        byte_limit=options.byte_limit,
        alphabet=tuple(alphabet),
        bases=tuple(bases),
        merges=tuple(merges),
        pairs=pairs,
        counts=tuple(used.get(text, 0) for _, text in learned),
    )
