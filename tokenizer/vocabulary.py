"""The frozen vocabulary: the text of each id and how the entry was made.

Layout of the ids, in this order: special tokens (0 to 8), the 256 bytes, case marks, turn tokens, the alphabet, base
tokens, merges, phrases. Case marks and turn tokens are not in every vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import NamedTuple

from tokenizer.encoding.unicode import capitalize, text_to_bytes
from tokenizer.errors import TokenizerError
from tokenizer.once import made_once

SPECIAL_TOKENS = ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK>", "<EOS>", "<RES>", "<SP>", "<NL>")
SP = 7
NL = 8
FIRST_BYTE = len(SPECIAL_TOKENS)
FIRST_LEARNED = FIRST_BYTE + 256
"""The first id after the byte tokens: case marks and turn tokens if there are any, then the learned entries."""
CASE_MARKS = ("<UP>", "<CAPS>")
TURN_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
"""Special tokens of conversations: the roles, and the end of a turn. Vocabularies of earlier versions have none."""
_RESERVED_FOR_TURNS = ("<CLS>", "<SEP>", "<MASK>", "<RES>")
"""Special tokens that nothing else uses, which take the place of turn tokens where there are none."""
MAX_ENTRIES = 1 << 20
"""Maximum number of entries in a vocabulary."""
MAX_ENTRY = 48
"""Maximum length of an entry other than a phrase, in characters."""
MAX_PHRASE = 96
"""Maximum length of a phrase, in characters."""
MAX_PORTABLE_ENTRY = 128
"""Maximum length of an entry of a portable vocabulary, in bytes."""
PORTABLE_PATTERN = "llama-bpe, Unicode 15.1"
"""The pattern of portable vocabularies; `tokenizer.portable.pretokens` has it."""

Edge = tuple[int, ...]
"""The ids of one step in the segmentation of a pre-token: an entry, or a case mark and an entry."""


def first_entry_id(lowercase: bool, turns: bool) -> int:
    """Return the id of the first learned entry of a vocabulary with or without case marks and turn tokens."""
    return FIRST_LEARNED + (len(CASE_MARKS) if lowercase else 0) + (len(TURN_TOKENS) if turns else 0)


def byte_name(value: int) -> str:
    """Return the name of a byte token, for example ``<0x0A>``."""
    return f"<0x{value:02X}>"


RESERVED_NAMES = frozenset(SPECIAL_TOKENS + CASE_MARKS + TURN_TOKENS + tuple(byte_name(value) for value in range(256)))
"""Texts that no learned entry may have, so that names are unambiguous."""


class TurnIds(NamedTuple):
    """The ids that delimit the turns of a conversation.

    Attributes:
        system: Begins a message of the system.
        user: Begins a message of the user.
        assistant: Begins a message of the assistant.
        end: Ends each message.
    """

    system: int
    user: int
    assistant: int
    end: int


class PhraseTable(NamedTuple):
    """The phrases of a vocabulary, keyed by the ids that they join.

    Attributes:
        sequences: {ids before joining: phrase id}.
        longest: Maximum number of ids that one phrase joins; 0 without phrases.
    """

    sequences: dict[tuple[int, ...], int]
    longest: int


def _text_or_empty(data: bytes) -> str:
    """Return UTF-8 data as text; "" if it is no text, such as a part of a character."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return ""


@dataclass(frozen=True)
class Vocabulary:
    """The complete state of a frozen tokenizer: equal contents give equal ids for every text.

    Attributes:
        lowercase: Whether case marks encode upper case; otherwise the entries contain it.
        byte_limit: Maximum length of a base token in UTF-8 bytes.
        alphabet: Entries of one character beyond ASCII.
        bases: Common short words.
        merges: (left id, right id) of each merge, parents before children. A merge lies within a pre-token
            (see `tokenizer.encoding.pretokenization`).
        phrases: (left id, right id) of each phrase, which joins ids of neighboring pre-tokens.
        pairs: {lower: upper} for the letters to which case marks apply.
        counts: Uses of each entry on the training text, in the order of the ids from the alphabet on; may be empty.
        note: Free text that is stored with the vocabulary.
        pattern: The name of the pre-tokenization pattern of a portable vocabulary (see `tokenizer.portable`): bases are
            whole pre-tokens, merges join bytes, and there are no alphabet, case marks and phrases. Empty for others.
        turns: Whether there are turn tokens.
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
    pattern: str = ""
    turns: bool = False

    # Layout of the ids

    @property
    def portable(self) -> bool:
        """True if a stock ``tokenizer.json`` gives the same ids."""
        return bool(self.pattern)

    @made_once
    def special_ids(self) -> tuple[int, ...]:
        """The ids that no text encodes to: without ``<SP>`` and ``<NL>``, unless the vocabulary is portable."""
        return *range(FIRST_BYTE if self.portable else SP), *range(self._first_turn, self.first_entry)

    @property
    def turn_ids(self) -> TurnIds:
        """The ids of the turn tokens: other special tokens in a vocabulary that has none."""
        if self.turns:
            return TurnIds(*range(self._first_turn, self.first_entry))
        return TurnIds(*map(SPECIAL_TOKENS.index, _RESERVED_FOR_TURNS))

    @property
    def _first_turn(self) -> int:
        return FIRST_LEARNED + (len(CASE_MARKS) if self.lowercase else 0)

    @made_once
    def first_entry(self) -> int:
        """The id of the first alphabet character."""
        return first_entry_id(self.lowercase, self.turns)

    @property
    def up(self) -> int:
        """The id of ``<UP>``, or -1 without case marks."""
        return FIRST_LEARNED if self.lowercase else -1

    @property
    def caps(self) -> int:
        """The id of ``<CAPS>``, or -1 without case marks."""
        return FIRST_LEARNED + 1 if self.lowercase else -1

    @made_once
    def case_marks(self) -> frozenset[int]:
        """The ids of ``<UP>`` and ``<CAPS>``; empty without case marks."""
        return frozenset((self.up, self.caps)) if self.lowercase else frozenset()

    @made_once
    def first_base(self) -> int:
        """The id of the first base token."""
        return self.first_entry + len(self.alphabet)

    @made_once
    def first_merge(self) -> int:
        """The id of the first merge."""
        return self.first_base + len(self.bases)

    @made_once
    def first_phrase(self) -> int:
        """The id of the first phrase."""
        return self.first_merge + len(self.merges)

    @made_once
    def size(self) -> int:
        """The number of ids, V."""
        return self.first_phrase + len(self.phrases)

    # Entries

    @made_once
    def texts(self) -> list[str]:
        """The text of each id, [V]; empty for special tokens, case marks and bytes beyond ASCII.

        Raises:
            TokenizerError: An entry is longer than training can make it.
        """
        if self.portable:
            return list(map(_text_or_empty, self._portable_data))
        texts = [""] * FIRST_BYTE + [chr(value) if value < 128 else "" for value in range(256)]
        texts[SP] = " "
        texts[NL] = "\n"
        texts += [""] * (self.first_entry - FIRST_LEARNED)
        texts += self.alphabet
        texts += self.bases
        up = self.up
        caps = self.caps
        # The limits keep a crafted file, whose entries could double in length with each merge, from exhausting memory.
        for pairs, limit in ((self.merges, MAX_ENTRY), (self.phrases, MAX_PHRASE)):
            for left, right in pairs:
                if left == up:
                    text = capitalize(texts[right], self.pairs)
                elif left == caps:
                    text = self.upper(texts[right])
                else:
                    text = texts[left] + texts[right]
                if len(text) > limit:
                    raise TokenizerError(f"token {len(texts)} is {len(text)} characters long: the maximum is {limit}")
                texts.append(text)
        return texts

    @made_once
    def data(self) -> list[bytes]:
        """The bytes of each id, [V]; empty for special tokens and case marks."""
        if self.portable:
            return self._portable_data
        data = [text_to_bytes(text) for text in self.texts]
        data[FIRST_BYTE:FIRST_LEARNED] = [bytes([value]) for value in range(256)]
        return data

    @made_once
    def _portable_data(self) -> list[bytes]:
        data = [b""] * FIRST_BYTE + [bytes([value]) for value in range(256)]
        data += [b""] * (self.first_entry - FIRST_LEARNED)
        data += [text_to_bytes(text) for text in self.bases]
        for left, right in self.merges:
            size = len(data[left]) + len(data[right])
            if size > MAX_PORTABLE_ENTRY:
                raise TokenizerError(
                    f"token {len(data)} is {size} bytes long: the maximum in a portable file is {MAX_PORTABLE_ENTRY}"
                )
            data.append(data[left] + data[right])
        return data

    @made_once
    def names(self) -> list[str]:
        """A printable, unique name of each id, [V]: a reserved name or the text of the entry.

        Entries of a portable vocabulary that are incomplete characters are named by their bytes: ``<0xE4><0xB8>``.
        """
        names = list(self.texts)
        if self.portable:
            names = [text or "".join(map(byte_name, data)) for text, data in zip(names, self.data, strict=True)]
            names[:FIRST_BYTE] = SPECIAL_TOKENS
            names[FIRST_LEARNED : self.first_entry] = TURN_TOKENS if self.turns else ()
            return names
        names[:FIRST_BYTE] = SPECIAL_TOKENS
        for value in range(256):
            if value >= 128 or value in (10, 32):
                names[FIRST_BYTE + value] = byte_name(value)
        case_marks = CASE_MARKS if self.lowercase else ()
        names[FIRST_LEARNED : self.first_entry] = (*case_marks, *(TURN_TOKENS if self.turns else ()))
        return names

    def kind(self, id_: int) -> str:
        """Return the kind of an id: special, sp, nl, byte, case, char, base, merge, run (of white space) or phrase."""
        if id_ in self.special_ids:
            return "special"
        if id_ == SP:
            return "sp"
        if id_ == NL:
            return "nl"
        if id_ < FIRST_LEARNED:
            return "byte"
        if id_ < self.first_entry:
            return "case"
        if id_ < self.first_base:
            return "char"
        if id_ < self.first_merge:
            return "base"
        if id_ >= self.first_phrase:
            return "phrase"
        return "merge" if self.data[id_].strip(b" \n\t\r") else "run"

    def parents(self, id_: int) -> tuple[int, int] | None:
        """Return the pair of ids that a merge, run or phrase was made of; None for other kinds."""
        if id_ >= self.first_phrase:
            return self.phrases[id_ - self.first_phrase]
        if id_ >= self.first_merge:
            return self.merges[id_ - self.first_merge]
        return None

    # Case marks

    def upper(self, text: str) -> str:
        """Return the text with every letter in upper case: the effect of ``<CAPS>`` on the token after it."""
        return text.translate(self._upper_table)

    @made_once
    def upper_texts(self) -> list[str]:
        """The text of each id after ``<CAPS>``, [V]."""
        table = self._upper_table
        if not all(table.get(ord(letter)) == letter.upper() for letter in ascii_lowercase):
            return [text.translate(table) for text in self.texts]
        return [text.upper() if text.isascii() else text.translate(table) for text in self.texts]  # upper() is faster

    @made_once
    def capitalized_texts(self) -> list[str]:
        """The text of each id after ``<UP>``, [V]."""
        upper = self.pairs.get
        return [
            upper(text[0], text[0]) + text[1:] if text[:1] not in ("", " ", "\n") else capitalize(text, self.pairs)
            for text in self.texts
        ]

    def marked_data(self, id_: int, mark: int) -> bytes:
        """Return the bytes of an id after the case mark `mark`."""
        if not self.texts[id_]:
            return self.data[id_]
        texts = self.capitalized_texts if mark == self.up else self.upper_texts
        return text_to_bytes(texts[id_])

    @made_once
    def _upper_table(self) -> dict[int, str]:
        return {ord(lower): upper for lower, upper in self.pairs.items()}

    @made_once
    def _lower_table(self) -> dict[int, str]:
        return {ord(upper): lower for lower, upper in self.pairs.items()}

    # Look-up by text, for encoding

    @made_once
    def edges(self) -> dict[str, Edge]:
        """{text: the fewest ids that encode it in one step}: an entry, or a case mark and an entry.

        Phrases are not included: they join pre-tokens, and edges lie within one.
        """
        ids = self._ids_with_text
        edges: dict[str, Edge] = {}
        if self.lowercase:
            # Later updates win: a plain entry over <UP>, and <UP> over <CAPS>. Marks apply to lower-case entries only.
            has_no_capital = frozenset(self.pairs.values()).isdisjoint
            lower_ids = [id_ for id_ in ids if has_no_capital(self.texts[id_])]
            edges.update((self.upper_texts[id_], (self.caps, id_)) for id_ in lower_ids)
            edges.update((self.capitalized_texts[id_], (self.up, id_)) for id_ in lower_ids)
        edges.update((text, (id_,)) for text, id_ in self._plain_edges.items())
        return edges

    def edge(self, text: str) -> Edge | None:
        """Return `edges.get(text)` without building all edges: for encoding little text soon after loading."""
        id_ = self._plain_edges.get(text)
        if id_ is not None:
            return (id_,)
        lower = text.translate(self._lower_table)
        if lower == text:
            return None
        id_ = self._plain_edges.get(lower)
        if id_ is None:
            return None
        if capitalize(lower, self.pairs) == text:
            return self.up, id_
        if self.upper(lower) == text:
            return self.caps, id_
        return None

    @made_once
    def longest(self) -> int:
        """The length of the longest text of `edges`, in characters."""
        return max(map(len, self.texts[: self.first_phrase]))

    @property
    def _ids_with_text(self) -> list[int]:
        return [SP, NL, *range(FIRST_BYTE, FIRST_BYTE + 128), *range(self.first_entry, self.first_phrase)]

    @made_once
    def _plain_edges(self) -> dict[str, int]:
        """{text: id} of the entries; of equal texts the first id wins, so " " is <SP> and not the byte 0x20."""
        return {self.texts[id_]: id_ for id_ in reversed(self._ids_with_text)}

    @made_once
    def id_of_data(self) -> dict[bytes, int]:
        """{bytes: id} of the byte tokens and entries of a portable vocabulary."""
        return {data: id_ for id_, data in enumerate(self.data) if data}

    @made_once
    def merge_ids(self) -> dict[tuple[int, int], int]:
        """{(left id, right id): id} of the merges of a portable vocabulary; the lowest id is merged first."""
        return {pair: self.first_merge + offset for offset, pair in enumerate(self.merges)}

    @made_once
    def phrase_table(self) -> PhraseTable:
        """The phrases, keyed by the ids that they join."""
        sequences: dict[int, tuple[int, ...]] = {}
        for offset, (left, right) in enumerate(self.phrases):
            parts = sequences.get(left, (left,)) + sequences.get(right, (right,))
            sequences[self.first_phrase + offset] = parts
        longest = max(map(len, sequences.values()), default=0)
        return PhraseTable({parts: id_ for id_, parts in sequences.items()}, longest)
