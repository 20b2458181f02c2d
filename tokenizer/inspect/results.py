"""Result types of the inspection methods: plain values for programs, whose `repr` is a report for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tokenizer.vocabulary import CASE_MARKS


class Segment(NamedTuple):
    """One token of a text.

    Attributes:
        text: The text that the token stands for; empty for case marks.
        kind: base, merge, byte, sp (space), nl (newline), char (one character beyond ASCII), run (of white space),
            case (a mark that changes the case of the next token), phrase, or special.
        id: The token's id.
    """

    text: str
    kind: str
    id: int


class Segments(list[Segment]):
    """The tokens of a text; prints as a line of kinds and texts."""

    def __repr__(self) -> str:
        return " ".join(f"[{kind} {text!r}]" if text else f"[{kind} #{id_}]" for text, kind, id_ in self)


@dataclass(frozen=True, repr=False)
class Explanation:
    """The decomposition of a token, or of a text that is not one token; prints as a tree.

    Attributes:
        id: The token's id; None for a text that is not one token.
        name: The token's name, or the text.
        kind: A kind of `Segment`, or "text".
        data: The bytes that it stands for.
        parts: The parts it is made of, each explained in the same way; empty for bytes, case marks and special tokens.
    """

    id: int | None
    name: str
    kind: str
    data: bytes
    parts: tuple[Explanation, ...] = ()

    def leaves(self) -> list[str]:
        """Return the names at the ends of the tree, from left to right."""
        if not self.parts:
            return [self.name]
        return [leaf for part in self.parts for leaf in part.leaves()]

    def lines(self, indent: str = "") -> list[str]:
        """Return the tree as lines of text."""
        line = f"{indent}{self.kind}"
        if self.id is not None:
            line += f" #{self.id}"
        line += f" {self.name!r}"
        if not self.parts:
            line += f" bytes {self.data.hex(' ')}"
        return [line, *(line for part in self.parts for line in part.lines(indent + "  "))]

    def __repr__(self) -> str:
        return "\n".join(self.lines())


class Merge(NamedTuple):
    """One learned merge or phrase.

    Attributes:
        rank: 0 for the most used one.
        id: Its id.
        text: Its text.
        left: Name of its left part.
        right: Name of its right part.
        count: Uses on the training text.
    """

    rank: int
    id: int
    text: str
    left: str
    right: str
    count: int  # type: ignore[assignment]  # hides tuple.count


class Merges(list[Merge]):
    """Merges by their use on the training text; prints as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no merges"
        lines = ["most used merges:", f"{'rank':>6}  {'id':>6}  {'uses':>10}  text = left + right"]
        lines += [f"{m.rank:>6}  {m.id:>6}  {m.count:>10}  {m.text!r} = {m.left!r} + {m.right!r}" for m in self]
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Status:
    """The state of a tokenizer; prints as a report.

    Attributes:
        frozen: Whether the vocabulary is frozen. The next three are 0 if it is, `vocab_size` is 0 if it is not.
        characters: Number of characters counted.
        keys: Number of distinct pre-tokens.
        undercount: No count is too low by more than this.
        vocab_size: Number of ids.
        kinds: {kind: number of entries}.
        preview: (text, count) of the most common pre-tokens or, if frozen, of the first entries.
        special: Names of the tokens without a text of their own.
    """

    frozen: bool
    characters: int
    keys: int
    undercount: int
    vocab_size: int
    kinds: dict[str, int]
    preview: tuple[tuple[str, int], ...]
    special: tuple[str, ...] = ()

    def __repr__(self) -> str:
        lines = self._frozen_lines() if self.frozen else self._counting_lines()
        lines += [f"{count:>10}  {text!r}" for text, count in self.preview]
        return "\n".join(lines)

    def _frozen_lines(self) -> list[str]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items() if count)
        marks = [name for name in self.special if name in CASE_MARKS]
        special = [name for name in self.special if name not in CASE_MARKS]
        lines = [f"frozen: {self.vocab_size} ids ({kinds})", f"special tokens: {' '.join(special)}"]
        if marks:
            lines.append(f"case marks: {' '.join(marks)}")
        if self.preview:
            lines.append(f"{'uses':>10}  first entries")
        return lines

    def _counting_lines(self) -> list[str]:
        lines = [f"counting: {self.characters} characters, {self.keys} distinct pre-tokens"]
        if self.undercount:
            lines.append(f"rare pre-tokens were dropped to bound memory: counts are up to {self.undercount} too low")
        if self.preview:
            lines.append(f"{'count':>10}  most common pre-tokens")
        return lines
