"""Rows of data sets, and their mapping to documents."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from slm_jax.chat.formats import (
    PREFERENCES,
    MalformedConversationError,
    RowFormat,
    format_of_columns,
    format_of_row,
    named_format,
    parse_conversation,
    type_name,
)
from slm_jax.config.schema import DataConfig
from slm_jax.data.sources.documents import Document, InvalidRow, Split
from slm_jax.data.sources.preferences import preference_document

# The prompt of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca); {0} and {2} depend on the input.
_ALPACA = (
    "Below is an instruction that describes a task{0}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{1}\n\n{2}### Response:\n"
)
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class Row(NamedTuple):
    """A row of a file or data set.

    Attributes:
        value: The columns by name; any JSON value if the row is malformed.
        location: File and line, or the like, for messages.
        split: The split that the data set assigns; None: it has no splits.
    """

    value: Any
    location: str
    split: Split | None = None


def columns_text(columns: Any) -> str:
    """Return the names of the first columns for a message: `text, id`."""
    return ", ".join(map(str, list(columns)[:12]))


@dataclass(frozen=True)
class RowMapper:
    """Map rows to documents: plain text from one column, or an instruction of a prompt and a response.

    Attributes:
        text_column: The column of the text, used without a template.
        template: `alpaca` (columns `instruction` and `input`, which may be empty), or a prompt with `{column}`
            placeholders; empty: no instructions.
        response_column: The column of the response, used with a template.
        aliases: Pairs (column in the template, name of the column in the data set).
        detects: Whether rows without the column of the text may be conversations, which `resolved_mapper` decides.
    """

    text_column: str = "text"
    template: str = ""
    response_column: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    detects: bool = False

    def describe(self) -> list[str]:
        """Return what the documents depend on, besides the rows; without what is detected in them."""
        return [self.text_column, self.template, self.response_column]

    def missing_column(self, columns: Collection[str]) -> str:
        """Return the first column that rows with these columns lack; empty: none."""
        if self.detects and self.text_column not in columns and format_of_columns(columns):
            return ""
        return next((name for name in self.required_columns() if name not in columns), "")

    def required_columns(self) -> list[str]:
        """Return the columns that every row must have; of an instruction, the response is the last."""
        if not self.template:
            return [self.text_column]
        names = ["instruction"] if self.template == "alpaca" else _PLACEHOLDER.findall(self.template)
        return [self._column(name) for name in [*names, self.response_column]]

    def to_document(self, row: Row) -> Document | InvalidRow:
        """Return the row's document, or the reason why it has none."""
        columns = row.value
        if not isinstance(columns, Mapping):
            return InvalidRow(f"a row is {type_name(columns)}, not an object of columns", row.location)
        required = self.required_columns()
        for name in required:
            if name not in columns:
                return InvalidRow(f"column {name} is missing (columns: {columns_text(columns)})", row.location)
            if not isinstance(columns[name], str):
                return InvalidRow(f"column {name} is {type_name(columns[name])}, not text", row.location)
        if not self.template:
            return Document(columns[self.text_column], split=row.split)
        response = columns[required[-1]]
        if not response.strip():
            return InvalidRow(f"column {required[-1]} is empty", row.location)
        return Document(self._prompt(columns), response, row.split)

    def _column(self, name: str) -> str:
        return dict(self.aliases).get(name, name)

    def _prompt(self, columns: Mapping[str, Any]) -> str:
        if self.template != "alpaca":
            return _PLACEHOLDER.sub(lambda match: columns[self._column(match[1])], self.template)
        context = columns.get(self._column("input")) or ""
        return _ALPACA.format(
            ", paired with an input that provides further context" if context else "",
            columns[self._column("instruction")],
            f"### Input:\n{context}\n\n" if context else "",
        )


@dataclass(frozen=True)
class ConversationMapper:
    """Map rows to conversations.

    Attributes:
        row_format: The format of all rows; None: that of each row, as its columns have it.
    """

    row_format: RowFormat | None = None

    def describe(self) -> list[str]:
        """Return what the documents depend on, besides the rows."""
        return ["conversations", *([self.row_format.name, *self.row_format.columns] if self.row_format else ())]

    def missing_column(self, columns: Collection[str]) -> str:
        """Return the first column that rows with these columns lack; empty: none."""
        if self.row_format is None:
            return "" if format_of_columns(columns) else "messages"
        return next((name for name in self.row_format.columns if name not in columns), "")

    def to_document(self, row: Row) -> Document | InvalidRow:
        """Return the row's conversation, or the reason why it has none."""
        columns = row.value
        if not isinstance(columns, Mapping):
            return InvalidRow(f"a row is {type_name(columns)}, not an object of columns", row.location)
        row_format = self.row_format or format_of_columns(columns)
        missing = self.missing_column(columns)
        if missing or row_format is None:
            return InvalidRow(f"column {missing} is missing (columns: {columns_text(columns)})", row.location)
        try:
            if row_format == PREFERENCES:
                return preference_document(columns, row.split)
            messages = parse_conversation(columns, row_format)
        except MalformedConversationError as error:
            return InvalidRow(str(error), row.location)
        return Document("", split=row.split, messages=messages)


Mapper = RowMapper | ConversationMapper


class ResolvedMapper(NamedTuple):
    """A mapper whose kind the first rows have decided.

    Attributes:
        mapper: The mapper.
        note: A line for the log; empty: none.
    """

    mapper: Mapper
    note: str = ""


def resolved_mapper(mapper: Mapper, rows: Iterable[Any]) -> ResolvedMapper:
    """Decide by the first rows whether a mapper yields text or conversations.

    Rows that have text in the column of the text stay text, whatever other columns they have.

    Args:
        mapper: The mapper of a source.
        rows: The values of the first rows.
    """
    objects = [row for row in rows if isinstance(row, Mapping)]
    found = next(filter(None, map(format_of_row, objects)), None)
    if isinstance(mapper, ConversationMapper):
        shown = mapper.row_format or found
        if shown is not None and len(shown.columns) == 1 and found is not None and shown.columns == found.columns:
            shown = found
        return ResolvedMapper(mapper, f"conversations in {shown.title}" if shown else "")
    if not mapper.detects:
        return ResolvedMapper(mapper)
    text = replace(mapper, detects=False)
    if any(isinstance(row.get(mapper.text_column), str) for row in objects):
        hint = f"the column {mapper.text_column} is read; --data.format chat reads the conversations in"
        return ResolvedMapper(text, f"{hint} {found.title}" if found and len(found.columns) == 1 else "")
    if found is None:
        return ResolvedMapper(text)
    note = f"conversations in {found.title}"
    if len(found.columns) > 1 and found != PREFERENCES:
        note += "; --data.template makes prompts of plain text instead"
    return ResolvedMapper(ConversationMapper(), note)


def make_row_mapper(config: DataConfig, default: Mapper | None = None) -> Mapper:
    """Return the mapper that a config asks for.

    Args:
        config: The options `format`, `text_field`, `template` and `response_field`.
        default: The mapper of the data set, used where the options are empty; None: plain text in the column `text`, or
            with the format `auto` what the first rows hold.
    """
    if config.format == "chat":
        column = config.text_field
        if isinstance(default, ConversationMapper) and not column:
            return default
        return ConversationMapper(named_format("messages", column) if column else None)
    if config.format not in ("auto", "text"):
        return ConversationMapper(named_format(config.format, config.text_field))
    if config.text_field:
        return RowMapper(text_column=config.text_field)
    if config.template or config.format == "text":
        default = replace(default, detects=False) if isinstance(default, RowMapper) else RowMapper()
    if not config.template:
        return default or RowMapper(detects=True)
    assert isinstance(default, RowMapper)
    template = config.template.replace("\\n", "\n")  # as typed in a shell
    response_column = config.response_field or default.response_column or "output"
    return RowMapper(template=template, response_column=response_column, aliases=default.aliases)
