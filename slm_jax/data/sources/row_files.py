"""Read the rows of JSON, JSON Lines and Parquet files."""

import contextlib
import importlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from slm_jax.data.sources.documents import InvalidRow
from slm_jax.data.sources.files import (
    check_text,
    file_errors,
    file_format,
    is_compressed,
    open_binary,
    open_text,
    read_lines,
)
from slm_jax.data.sources.rows import Row
from slm_jax.data.sources.sniffing import HEAD_SIZE
from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import import_optional

_ROWS_AT_ONCE = 1000  # rows of a Parquet file that are converted to Python objects together
_SAMPLE_LINES = 100  # of a .json file that is not valid JSON, to see whether it has a row per line


def read_rows(path: Path, encoding_errors: str = "strict") -> Iterator[Row | InvalidRow]:
    """Yield the rows of a JSON, JSON Lines or Parquet file, which may be compressed.

    A `.json` file holds a list of rows, a single row, or one row per line.

    Args:
        path: A file whose `file_format` is one of `ROW_FORMATS`.
        encoding_errors: Bytes that are not UTF-8: `strict` makes the row invalid, `replace` puts U+FFFD in their place.

    Yields:
        Rows in the order of the file; an InvalidRow for a line that is not valid JSON, and for a row with text that is
        not UTF-8.

    Raises:
        UserError: The file is damaged, binary or cannot be read, or the library for its format is not installed.
    """
    kind = file_format(path)
    with file_errors(path):
        if kind == ".parquet":
            yield from _parquet_rows(path, encoding_errors)
        elif kind == ".json":
            yield from _json_rows(path, encoding_errors)
        else:
            with open_text(path) as file:
                yield from _json_lines(read_lines(file, path), path, encoding_errors)


def parquet_columns(path: Path) -> list[str]:
    """Return the names of the columns of a Parquet file.

    Raises:
        UserError: The file is not valid Parquet or cannot be read, or pyarrow is not installed.
    """
    with file_errors(path), _parquet_file(path) as file:
        return list(file.schema_arrow.names)


def _parquet_rows(path: Path, encoding_errors: str) -> Iterator[Row | InvalidRow]:
    number = 0
    with _parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            try:
                values = batch.to_pylist()
            except UnicodeDecodeError:  # Parquet does not check its text
                values = [_decoded_row(batch, index, encoding_errors) for index in range(batch.num_rows)]
            for value in values:
                number += 1
                location = f"{path} row {number}"
                yield InvalidRow(value, location) if isinstance(value, str) else Row(value, location)


def _decoded_row(batch: Any, index: int, encoding_errors: str) -> dict[str, Any] | str:
    """Return a row of a batch whose text may not be UTF-8, or the reason why it is invalid."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        value = column[index]
        try:
            row[name] = value.as_py()
        except UnicodeDecodeError:
            value = getattr(value, "value", value)  # of a dictionary
            if encoding_errors == "strict" or not hasattr(value, "as_buffer"):  # text in lists has no buffer
                return f"column {name} is not UTF-8"
            row[name] = value.as_buffer().to_pybytes().decode(errors=encoding_errors)
    return row


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    """Open a Parquet file. Its parts are not read in order: a compressed one is unpacked to a temporary file."""
    pyarrow = import_optional("pyarrow", "reading Parquet")
    parquet = importlib.import_module("pyarrow.parquet")
    with contextlib.ExitStack() as stack:
        file: Any = path
        if is_compressed(path):
            file = stack.enter_context(tempfile.TemporaryFile())
            with open_binary(path) as packed:
                shutil.copyfileobj(packed, file)
            file.seek(0)
        try:
            yield parquet.ParquetFile(file)
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not a valid Parquet file: {error}") from None


def _json_rows(path: Path, encoding_errors: str) -> Iterator[Row | InvalidRow]:
    with open_binary(path) as file:
        data = file.read()
    try:
        rows = _load_json(data, encoding_errors)
    except (ValueError, RecursionError) as error:
        check_text(path, data[:HEAD_SIZE])
        lines = data.splitlines()
        if not _has_row_per_line(lines):
            raise UserError(f"{path} is not valid JSON ({_json_problem(data, error)})") from None
        yield from _json_lines(lines, path, encoding_errors)
        return
    if not isinstance(rows, list):
        rows = [rows]
    for number, value in enumerate(rows, start=1):
        yield Row(value, f"{path} row {number}")


def _has_row_per_line(lines: Iterable[bytes]) -> bool:
    """Return whether at least half of the first lines are objects, as in a JSON Lines file."""
    sample = list(itertools.islice((line for line in lines if line.strip()), _SAMPLE_LINES))
    objects = 0
    for line in sample:
        try:
            objects += isinstance(_load_json(line, "replace"), dict)
        except (ValueError, RecursionError):
            continue
    return 2 * objects >= len(sample) > 1


def _json_problem(data: bytes, error: Exception) -> str:
    """Return the place and the kind of the first error of a JSON text."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{data[error.start]:02x} at offset {error.start:,} is not UTF-8"
    if not isinstance(error, json.JSONDecodeError):
        return "it is nested too deeply"
    before = error.doc[: error.pos].rstrip()
    bracket = error.doc[error.pos : error.pos + 1]
    if before.endswith(",") and bracket in ("]", "}"):
        return f"line {before.count(chr(10)) + 1}: a comma stands before a closing {bracket}: remove it"
    return f"line {error.lineno}, column {error.colno}: {error.msg}"


def _json_lines(lines: Iterable[bytes], path: Path, encoding_errors: str) -> Iterator[Row | InvalidRow]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        location = f"{path} line {number}"
        try:
            yield Row(_load_json(line, encoding_errors), location)
        except UnicodeDecodeError:
            yield InvalidRow("a line is not UTF-8", location)
        except (ValueError, RecursionError):
            yield InvalidRow("a line is not valid JSON", location)


def _load_json(data: bytes, encoding_errors: str) -> Any:
    """Parse JSON.

    Raises:
        UnicodeDecodeError: It is not UTF-8, and `encoding_errors` is `strict`.
        ValueError, RecursionError: It is not valid, or nested too deeply.
    """
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        if encoding_errors == "strict":
            raise
        return json.loads(data.decode("utf-8-sig", errors=encoding_errors))
