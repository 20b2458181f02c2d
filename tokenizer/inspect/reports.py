"""What the tokenizer tells about itself: plain values for programs, whose `repr` is a report for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Segment(NamedTuple):
    """One token of a text: the text it stands for, its kind and its id.

    Kinds: base, merge, byte, sp, nl, char (one character beyond ASCII), run (white space), case (a mark that changes
    the case of the next token; its text is empty), phrase, special.
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
    """How a token, or a text that is none (`id` is None), is made: its parts are explained in the same way."""

    id: int | None
    name: str
    kind: str
    data: bytes
    parts: tuple[Explanation, ...] = ()

    def leaves(self) -> list[str]:
        """The names at the ends of the tree, from left to right."""
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self.name]

    def lines(self, indent: str = "") -> list[str]:
        """The tree as lines of text."""
        number = "" if self.id is None else f" #{self.id}"
        own = f"{indent}{self.kind}{number} {self.name!r}" + (f" bytes {self.data.hex(' ')}" if not self.parts else "")
        return [own, *(line for part in self.parts for line in part.lines(indent + "  "))]

    def __repr__(self) -> str:
        return "\n".join(self.lines())


class Merge(NamedTuple):
    """One learned merge: rank (0 is the most used), id, text, the texts of its parts and its count in training."""

    rank: int
    id: int
    text: str
    left: str
    right: str
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


class Merges(list[Merge]):
    """The most used merges, by their use on the training text; prints as a table."""

    def __repr__(self) -> str:
        rows = [f"{m.rank:>6}  {m.id:>6}  {m.count:>10}  {m.text!r} = {m.left!r} + {m.right!r}" for m in self]
        head = ["most used merges:", f"{'rank':>6}  {'id':>6}  {'uses':>10}  text = left + right"]
        return "\n".join([*head, *rows] if rows else ["no merges"])


@dataclass(frozen=True, repr=False)
class Status:
    """What was counted and learned. `preview` holds (text, count) of the most common keys, or of the first entries."""

    frozen: bool
    characters: int
    keys: int
    undercount: int
    vocab_size: int
    kinds: dict[str, int]
    preview: tuple[tuple[str, int], ...]
    special: tuple[str, ...] = ()  # names of tokens that stand for no text of their own

    def __repr__(self) -> str:
        lines = []
        if self.frozen:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items() if count)
            lines.append(f"frozen: {self.vocab_size} ids ({kinds})")
            lines.append(f"special tokens: {' '.join(self.special)}")
        else:
            lines.append(f"counting: {self.characters} characters, {self.keys} different keys")
            if self.undercount:
                lines.append(f"rare keys were dropped to bound the memory: counts are up to {self.undercount} too low")
        if self.preview:
            lines.append(f"{'uses':>10}  first entries" if self.frozen else f"{'count':>10}  most common keys")
        lines += [f"{count:>10}  {text!r}" for text, count in self.preview]
        return "\n".join(lines)
