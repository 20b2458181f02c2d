"""From counted keys to a vocabulary: alphabet, base tokens, merges and, when asked for, phrases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokenizer.errors import TokenizerError
from tokenizer.merges import BREAK, SCORES, PairMerger, learn_merges
from tokenizer.units import PUNCTUATION, capitalised, case_pairs, cut_long_key
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

# Merges grow inside of these: a word with the space before it, digits, punctuation with the space before it, white space.
WORD = re.compile(
    rf"[ \n\t\r]+(?=[ ])|[ ]?(?:[^ \n\t\r0-9{PUNCTUATION}]|(?<=[^ \n\t\r0-9{PUNCTUATION}])['’](?=[^ \n\t\r0-9{PUNCTUATION}]))+"
    rf"|[ ]?[0-9]{{1,3}}|[ ]?(?![\t\r])[{PUNCTUATION}]+|[ \n\t\r]+"
)


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
        if isinstance(self.phrases, bool) or not isinstance(self.phrases, int | float) or not 0 <= self.phrases <= 0.5:
            raise TokenizerError(f"phrases is {self.phrases!r}: it must be a share from 0 to 0.5")


def training_words(keys: dict[str, int]) -> Counter[str]:
    """The weighted words in which merges may grow, out of counted keys."""
    words: Counter[str] = Counter()
    for key, count in keys.items():
        for part in cut_long_key(key):
            for word in WORD.findall(part):
                words[word] += count
    return words


def fold_case(words: Counter[str], pairs: dict[str, str]) -> Counter[str]:
    """The words in lower case, cut before an upper-case letter inside of them."""
    if not pairs:
        return words
    lower = re.escape("".join(pairs))
    upper = re.escape("".join(pairs.values()))
    runs = re.compile(rf" ?[{upper}]+(?![{lower}])| ?[{upper}]?[^{upper}]+|[{upper}]+| ")
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
        bare = word[1:] if word[:1] == " " else word
        if count >= min_freq and len(word) > 1 and bare.strip() and bare not in RESERVED_NAMES:
            size = len(bare.encode("utf-8", "surrogatepass"))
            if size <= byte_limit and not any("\ud800" <= letter <= "\udfff" for letter in bare):
                found.append((-count, word))
    return [word for _, word in sorted(found)[:limit]]


def _forbidden(text: str) -> bool:
    return len(text) > MAX_ENTRY or text in RESERVED_NAMES


def learn_vocabulary(keys: dict[str, int], options: LearnOptions, progress: Progress | None = None) -> Vocabulary:
    """Learn a vocabulary; deterministic in the counts and options, whatever the order of `keys`."""
    words = training_words(keys)
    pairs: dict[str, str] = {}
    if options.lowercase:
        letters = {letter.lower() for letter in set("".join(words))}
        pairs = case_pairs({letter for letter in letters if len(letter) == 1})
        words = fold_case(words, pairs)
    fixed = FIRST_LEARNED + (len(CASE_MARKS) if options.lowercase else 0)
    room = (options.vocab_size or 1 << 40) - fixed
    symbols = Symbols(words, min(room // 2, 1 << 16), options.min_freq)
    room -= len(symbols.alphabet)
    bases = choose_bases(words, min(room, options.k_bases or 0), options.byte_limit, options.min_freq)
    wanted = room - len(bases)
    if options.max_merges is not None:
        wanted = min(wanted, options.max_merges)
    known = set(bases)
    merger = PairMerger(symbols.symbols, symbols.weights, symbols.texts(), options.score, options.min_freq)
    report = None if progress is None else (lambda done, of: progress("merges", done, of))
    merges = learn_merges(merger, wanted, _forbidden, report)
    texts = [merger.texts[symbol] for _, _, symbol in merges]
    if options.k_bases is None:
        whole = set(choose_bases(words, 1 << 40, options.byte_limit, options.min_freq))
        bases = [text for text in texts if text in whole]
    return assemble(texts, bases, symbols.alphabet, pairs, options)


def assemble(
    texts: list[str], bases: list[str], alphabet: list[str], pairs: dict[str, str], options: LearnOptions
) -> Vocabulary:
    """Number the entries: alphabet, bases, then merges in the order of `texts`, parents before children."""
    first = FIRST_LEARNED + (len(CASE_MARKS) if options.lowercase else 0)
    ids: dict[str, int] = {chr(value): FIRST_BYTE + value for value in range(128)}
    ids[" "], ids["\n"] = SP, NL
    for text in [*alphabet, *bases]:
        ids.setdefault(text, first)
        first += 1
    known = {*ids, *texts}
    lower = {ord(big): small for small, big in pairs.items()}
    merges: list[tuple[int, int]] = []

    def place(text: str) -> int:
        if text in ids:
            return ids[text]
        marked = marked_parent(text, known, lower, pairs)
        if marked is not None:
            pair = (FIRST_LEARNED + CASE_MARKS.index(marked[0]), place(marked[1]))
        else:
            cut = next(cut for cut in range(len(text) - 1, 0, -1) if text[:cut] in known and text[cut:] in known)
            pair = (place(text[:cut]), place(text[cut:]))
        ids[text] = first + len(merges)
        merges.append(pair)
        return ids[text]

    for text in texts:
        place(text)
    return Vocabulary(
        lowercase=options.lowercase,
        byte_limit=options.byte_limit,
        alphabet=tuple(alphabet),
        bases=tuple(bases),
        merges=tuple(merges),
        pairs=pairs,
    )


def marked_parent(text: str, known: set[str], lower: dict[int, str], pairs: dict[str, str]) -> tuple[str, str] | None:
    """(case mark, entry) that spell `text`, or None when it has no upper-case letters or no such entry is known."""
    small = text.translate(lower)
    if small == text or small not in known:
        return None
    if capitalised(small, pairs) == text:
        return "<UP>", small
    if small.translate({ord(key): value for key, value in pairs.items()}) == text:
        return "<CAPS>", small
    return None
