"""What a source gives: documents one after another, from any position on, and what was wrong with the rest."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

Split = Literal["train", "validation"]


class Document(NamedTuple):
    """One text. response: of an instruction, what follows the text (then the prompt) and is encoded on its own.

    split: where the source itself puts it; None: its hash decides.
    """

    text: str
    response: str | None = None
    split: Split | None = None


class InvalidRow(NamedTuple):
    """A row or line that is no document: counted by its reason, the first of each is reported with its place."""

    reason: str
    where: str


class Reader(Protocol):
    """Reads a source once, in its fixed order."""

    def __iter__(self) -> Iterator[Document | InvalidRow]:
        """What is left to read. Raises UserError where a source as a whole cannot be read."""

    def position(self) -> Any:
        """Where the next one is, as JSON: `Source.read(position)` goes on there."""

    @property
    def version(self) -> str:
        """The state of the source that is read, where it has a name (a commit of the hub)."""


class Source(Protocol):
    """Documents by name."""

    name: str

    def describe(self) -> Any:
        """What tells one state of the text from another, as JSON."""

    def read(self, position: Any = None) -> Reader:
        """Its documents from a position on, or all."""


_ALPACA = (
    "Below is an instruction that describes a task{0}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{1}\n\n{2}### Response:\n"
)
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class RowMapper:
    """How a row becomes a document: its column `text`; or a prompt by `template`, and the column `response`.

    template: alpaca (columns instruction and input, which may be empty), or text with {column}s. also: other names of
    columns, {ours: theirs}.
    """

    text: str = "text"
    template: str = ""
    response: str = ""
    also: tuple[tuple[str, str], ...] = ()

    def required_columns(self) -> list[str]:
        """The columns that every row must have."""
        names = {"alpaca": ["instruction"]}.get(self.template) or _FIELD.findall(self.template)
        return [dict(self.also).get(name, name) for name in [*names, self.response]] if self.template else [self.text]

    def to_document(self, row: Any, where: str) -> Document | InvalidRow:
        """The row's document, or what is wrong with it."""
        if not isinstance(row, Mapping):
            return InvalidRow(f"a row is {_kind(row)}, not an object of columns", where)
        for name in self.required_columns():
            if name not in row:
                return InvalidRow(f"column {name} is missing (there: {', '.join(map(str, list(row)[:12]))})", where)
            if not isinstance(row[name], str):
                return InvalidRow(f"column {name} is {_kind(row[name])}, not text", where)
        if not self.template:
            return Document(row[self.text])
        response = row[self.required_columns()[-1]]
        if not response.strip():
            return InvalidRow(f"column {self.required_columns()[-1]} is empty", where)
        return Document(self._prompt(row), response)

    def _prompt(self, row: Mapping[str, Any]) -> str:
        names = dict(self.also)
        if self.template != "alpaca":
            return _FIELD.sub(lambda match: row[names.get(match[1], match[1])], self.template)
        more = row.get(names.get("input", "input")) or ""
        return _ALPACA.format(
            ", paired with an input that provides further context" if more else "",
            row[names.get("instruction", "instruction")],
            f"### Input:\n{more}\n\n" if more else "",
        )


def _kind(value: Any) -> str:
    if value is None:
        return "empty (null)"
    return {"dict": "an object", "list": "a list", "str": "text"}.get(kind := type(value).__name__, f"of type {kind}")
