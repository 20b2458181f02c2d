"""Rows of data sets, and their mapping to documents."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from slm_jax.config.schema import DataConfig
from slm_jax.data.sources.documents import Document, InvalidRow, Split

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
    """

    text_column: str = "text"
    template: str = ""
    response_column: str = ""
    aliases: tuple[tuple[str, str], ...] = ()

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
            return InvalidRow(f"a row is {_type_name(columns)}, not an object of columns", row.location)
        required = self.required_columns()
        for name in required:
            if name not in columns:
                return InvalidRow(f"column {name} is missing (columns: {columns_text(columns)})", row.location)
            if not isinstance(columns[name], str):
                return InvalidRow(f"column {name} is {_type_name(columns[name])}, not text", row.location)
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


def make_row_mapper(config: DataConfig, default: RowMapper | None = None) -> RowMapper:
    """Return the mapper that a config asks for.

    Args:
        config: The options `text_field`, `template` and `response_field`.
        default: The mapper of the data set, used where the options are empty; None: plain text in `text`.
    """
    default = default or RowMapper()
    if config.text_field:
        return RowMapper(text_column=config.text_field)
    if not config.template:
        return default
    template = config.template.replace("\\n", "\n")  # as typed in a shell
    response_column = config.response_field or default.response_column or "output"
    return RowMapper(template=template, response_column=response_column, aliases=default.aliases)


def _type_name(value: Any) -> str:
    """Return the type of a JSON value in words."""
    if value is None:
        return "empty (null)"
    name = type(value).__name__
    return {"dict": "an object", "list": "a list", "str": "text"}.get(name, f"of type {name}")
