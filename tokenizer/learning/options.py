"""The options of `HybridTokenizer.freeze_vocab`, and their validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tokenizer.errors import TokenizerError
from tokenizer.learning.merges import SCORES
from tokenizer.learning.training_words import BOUNDARIES
from tokenizer.vocabulary import MAX_ENTRIES, first_entry_id

ProgressCallback = Callable[[str, int, int], None]
"""Called as progress(description, done, total) now and then during long work."""


@dataclass(frozen=True)
class LearnOptions:
    """Options of `HybridTokenizer.freeze_vocab`, which documents them.

    Raises:
        TokenizerError: An option is invalid.
    """

    lowercase: bool
    byte_limit: int
    vocab_size: int | None
    k_bases: int | None
    max_merges: int | None
    min_freq: int
    score: str
    phrases: float
    boundaries: str
    portable: bool = False
    turn_tokens: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.turn_tokens, bool):
            raise TokenizerError(f"turn_tokens is {self.turn_tokens!r}: it must be True or False")
        _check_integer("vocab_size", self.vocab_size, first_entry_id(True, self.turn_tokens))
        _check_integer("k_bases", self.k_bases, 0)
        _check_integer("max_merges", self.max_merges, 0)
        _check_integer("min_freq", self.min_freq, 1)
        if self.score not in SCORES:
            raise TokenizerError(f"score is {self.score!r}: it must be one of {', '.join(SCORES)}")
        if self.boundaries not in BOUNDARIES:
            raise TokenizerError(f"boundaries is {self.boundaries!r}: it must be one of {', '.join(BOUNDARIES)}")
        if isinstance(self.phrases, bool) or not isinstance(self.phrases, int | float) or not 0 <= self.phrases <= 0.5:
            raise TokenizerError(f"phrases is {self.phrases!r}: it must be a number from 0 to 0.5")

        if self.portable and self.phrases:
            raise TokenizerError("phrases must be 0 in a portable tokenizer: a tokenizer.json cannot express them")
        if self.portable and self.boundaries != "words":
            raise TokenizerError('boundaries must be "words" in a portable tokenizer: its pattern is fixed')

    @property
    def first_entry(self) -> int:
        """The id of the first learned entry."""
        return first_entry_id(self.lowercase, self.turn_tokens)

    @property
    def phrase_count(self) -> int:
        """The number of phrases to learn, at most."""
        if self.vocab_size is None:
            learned = self.max_merges or 0
        else:
            learned = self.vocab_size - first_entry_id(True, self.turn_tokens)
        return int(self.phrases * learned)

    def without_phrases(self) -> LearnOptions:
        """Return the options for learning everything except the phrases."""
        size = None if self.vocab_size is None else self.vocab_size - self.phrase_count
        merges = None if self.max_merges is None else max(0, self.max_merges - self.phrase_count)
        return replace(self, vocab_size=size, max_merges=merges, phrases=0.0)


def _check_integer(name: str, value: object, minimum: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TokenizerError(f"{name} is {value!r}: it must be an integer")
    if value < minimum:
        reason = ": special tokens, bytes and case marks alone need that many ids" if name == "vocab_size" else ""
        raise TokenizerError(f"{name} is {value}: it must be at least {minimum}{reason}")
    if value > MAX_ENTRIES:
        raise TokenizerError(f"{name} is {value}: it must be at most {MAX_ENTRIES}")
