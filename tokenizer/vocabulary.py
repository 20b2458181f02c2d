"""The frozen vocabulary: what each id stands for and how it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from string import ascii_lowercase
from typing import NamedTuple

from tokenizer.errors import TokenizerError
from tokenizer.units import capitalised, text_to_bytes

SPECIAL_TOKENS = ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK>", "<EOS>", "<RES>", "<SP>", "<NL>")
SP, NL = 7, 8
FIRST_BYTE = len(SPECIAL_TOKENS)
FIRST_LEARNED = FIRST_BYTE + 256
"""The first id after the byte tokens: the two case marks when there are any, then what was learned."""
CASE_MARKS = ("<UP>", "<CAPS>")
MAX_ENTRIES = 1 << 20
"""Entries that a vocabulary may have."""
MAX_ENTRY = 48
"""Characters of the longest entry other than a phrase."""
MAX_PHRASE = 96
"""Characters of the longest phrase."""

Edge = tuple[int, ...]


def byte_name(value: int) -> str:
    """How a byte token is called: ``<0x0A>``."""
    return f"<0x{value:02X}>"


RESERVED_NAMES = frozenset(SPECIAL_TOKENS + CASE_MARKS + tuple(byte_name(value) for value in range(256)))
"""No learned entry is spelled like one of these, so that a name means one thing."""


class PhraseTable(NamedTuple):
    """{ids in the text before joining: phrase id}, and the most ids that one phrase joins."""

    sequences: dict[tuple[int, ...], int]
    longest: int


@dataclass(frozen=True)
class Vocabulary:
    """Everything a frozen tokenizer knows; equal contents mean equal ids for every text.

    `alphabet` are single characters beyond ASCII and `bases` short common words: both stand by themselves.
    `merges` and `phrases` are pairs (left id, right id), parents before children. A merge lies inside a key
    (see `tokenizer.units`); a phrase joins the ids of neighbouring keys. `counts` (same order as the learned ids) tell
    how often each entry was used on the training text.
    """

    lowercase: bool
    byte_limit: int
    alphabet: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    merges: tuple[tuple[int, int], ...] = ()
    phrases: tuple[tuple[int, int], ...] = ()
    pairs: dict[str, str] = field(default_factory=dict)
    counts: tuple[int, ...] = ()
    note: str = ""

    @cached_property
    def first_entry(self) -> int:
        """The id of the first alphabet character."""
        return FIRST_LEARNED + (len(CASE_MARKS) if self.lowercase else 0)

    @property
    def up(self) -> int:
        """The id of ``<UP>``, or -1 where case stays in the entries."""
        return FIRST_LEARNED if self.lowercase else -1

    @property
    def caps(self) -> int:
        """The id of ``<CAPS>``, or -1."""
        return FIRST_LEARNED + 1 if self.lowercase else -1

    @cached_property
    def first_base(self) -> int:
        """The id of the first base token."""
        return self.first_entry + len(self.alphabet)

    @cached_property
    def first_merge(self) -> int:
        """The id of the first merge."""
        return self.first_base + len(self.bases)

    @cached_property
    def first_phrase(self) -> int:
        """The id of the first phrase."""
        return self.first_merge + len(self.merges)

    @cached_property
    def size(self) -> int:
        """The number of ids."""
        return self.first_phrase + len(self.phrases)

    @cached_property
    def texts(self) -> list[str]:
        """The text of each id; empty for special tokens, case marks and the bytes that are no ASCII character."""
        texts = [""] * FIRST_BYTE + [chr(value) if value < 128 else "" for value in range(256)]
        texts[SP], texts[NL] = " ", "\n"
        texts += [""] * (self.first_entry - FIRST_LEARNED)
        texts += self.alphabet
        texts += self.bases
        up, caps = self.up, self.caps
        # Longer entries than these cannot be made by training; a file that claims them must not eat the memory.
        limits = (MAX_ENTRY, MAX_PHRASE)
        for pairs, limit in zip((self.merges, self.phrases), limits, strict=True):
            for left, right in pairs:
                if left == up:
                    text = capitalised(texts[right], self.pairs)
                elif left == caps:
                    text = self.upper(texts[right])
                else:
                    text = texts[left] + texts[right]
                if len(text) > limit:
                    raise TokenizerError(f"token {len(texts)} is {len(text)} characters long: the most is {limit}")
                texts.append(text)
        return texts

    def upper(self, text: str) -> str:
        """The text with every letter in upper case: what ``<CAPS>`` means for the one token after it."""
        return text.translate(self._upper_table)

    @cached_property
    def _upper_table(self) -> dict[int, str]:
        return {ord(lower): upper for lower, upper in self.pairs.items()}

    @cached_property
    def edges(self) -> dict[str, Edge]:
        """{text: the shortest ids that stand for it alone}: an entry, or a case mark and an entry.

        Phrases are not among them: they join keys, and this maps what lies inside of one.
        """
        ids = self._ids_with_text
        edges: dict[str, Edge] = {}
        if self.lowercase:
            # Later lines win: the plain entry over <UP>, and <UP> over <CAPS>. Marks go before small letters only.
            upper, capitals = self.upper_texts, self.capitalised_texts
            no_capital = frozenset(self.pairs.values()).isdisjoint
            plain = [id_ for id_ in ids if no_capital(self.texts[id_])]
            edges.update((upper[id_], (self.caps, id_)) for id_ in plain)
            edges.update((capitals[id_], (self.up, id_)) for id_ in plain)
        edges.update((text, (id_,)) for text, id_ in self._plain_edges.items())
        return edges

    def edge(self, text: str) -> Edge | None:
        """`edges.get(text)`, without all of them being made: the way to encode little soon after loading."""
        id_ = self._plain_edges.get(text)
        if id_ is not None:
            return (id_,)
        small = text.translate(self._lower_table)
        if small == text or (id_ := self._plain_edges.get(small)) is None:
            return None
        if capitalised(small, self.pairs) == text:
            return self.up, id_
        return (self.caps, id_) if self.upper(small) == text else None

    @property
    def _ids_with_text(self) -> list[int]:
        return [SP, NL, *range(FIRST_BYTE, FIRST_BYTE + 128), *range(self.first_entry, self.first_phrase)]

    @cached_property
    def _plain_edges(self) -> dict[str, int]:
        """{text: id} of the entries; SP rather than byte 0x20."""
        ids = self._ids_with_text[::-1]
        return {self.texts[id_]: id_ for id_ in ids}

    @cached_property
    def _lower_table(self) -> dict[int, str]:
        return {ord(upper): lower for lower, upper in self.pairs.items()}

    @cached_property
    def upper_texts(self) -> list[str]:
        """The text of each id behind <CAPS>."""
        table = self._upper_table
        if not all(table.get(ord(letter)) == letter.upper() for letter in ascii_lowercase):
            return [text.translate(table) for text in self.texts]
        return [text.upper() if text.isascii() else text.translate(table) for text in self.texts]  # upper is faster

    @cached_property
    def capitalised_texts(self) -> list[str]:
        """The text of each id behind <UP>."""
        pair, white = self.pairs.get, ("", " ", "\n")
        return [
            pair(text[0], text[0]) + text[1:] if text[:1] not in white else capitalised(text, self.pairs)
            for text in self.texts
        ]

    @cached_property
    def longest(self) -> int:
        """Characters of the longest key of `edges`."""
        return max(map(len, self.texts[: self.first_phrase]))

    @cached_property
    def data(self) -> list[bytes]:
        """The bytes of each id; empty for special tokens and case marks."""
        data = [text_to_bytes(text) for text in self.texts]
        data[FIRST_BYTE:FIRST_LEARNED] = [bytes([value]) for value in range(256)]
        return data

    @cached_property
    def names(self) -> list[str]:
        """A printable, unique name of each id: reserved names, else the entry's own text."""
        names = list(self.texts)
        names[:FIRST_BYTE] = SPECIAL_TOKENS
        for value in range(256):
            if value >= 128 or value in (10, 32):
                names[FIRST_BYTE + value] = byte_name(value)
        names[FIRST_LEARNED : self.first_entry] = CASE_MARKS if self.lowercase else ()
        return names

    def kind(self, id_: int) -> str:
        """special, sp, nl, byte, case, char, base, merge, run (a merge of white space only) or phrase."""
        if id_ < FIRST_BYTE:
            return {SP: "sp", NL: "nl"}.get(id_, "special")
        for end, kind in ((FIRST_LEARNED, "byte"), (self.first_entry, "case"), (self.first_base, "char")):
            if id_ < end:
                return kind
        if id_ < self.first_merge:
            return "base"
        if id_ >= self.first_phrase:
            return "phrase"
        return "merge" if self.texts[id_].strip(" \n\t\r") else "run"

    def parents(self, id_: int) -> tuple[int, int] | None:
        """The pair that a merge, run or phrase was made of; None for everything else."""
        if id_ >= self.first_phrase:
            return self.phrases[id_ - self.first_phrase]
        if id_ >= self.first_merge:
            return self.merges[id_ - self.first_merge]
        return None

    @cached_property
    def phrase_table(self) -> PhraseTable:
        """The phrases by the ids they join."""
        sequences: dict[int, tuple[int, ...]] = {}
        for offset, (left, right) in enumerate(self.phrases):
            parts = sequences.get(left, (left,)) + sequences.get(right, (right,))
            sequences[self.first_phrase + offset] = parts
        longest = max(map(len, sequences.values()), default=0)
        return PhraseTable({parts: id_ for id_, parts in sequences.items()}, longest)

    def marked_data(self, id_: int, mark: int) -> bytes:
        """The bytes of an id behind a case mark."""
        if not self.texts[id_]:
            return self.data[id_]
        return text_to_bytes((self.capitalised_texts if mark == self.up else self.upper_texts)[id_])
