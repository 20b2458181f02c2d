"""Documents in local files: text, JSON Lines and Parquet, also compressed."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any

from slm_jax.data.sources.documents import Document, InvalidRow
from slm_jax.data.sources.files import (
    MAX_DOCUMENT,
    ROW_FORMATS,
    describe_files,
    file_errors,
    file_format,
    find_files,
    open_text,
    read_lines,
    too_long_error,
)
from slm_jax.data.sources.row_files import parquet_columns, read_rows
from slm_jax.data.sources.rows import ConversationMapper, Mapper, Row, RowMapper, resolved_mapper
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural

logger = logging.getLogger(__name__)

DEFAULT_SEPARATOR = "<|endoftext|>"
_BLOCK = 1 << 20  # bytes of a text file that are read at once
_FIRST_ROWS = 20  # by which the format of the rows is detected


class FileSource:
    """The documents of files, in the order of the files' paths."""

    def __init__(
        self,
        patterns: Sequence[str],
        mapper: Mapper | None = None,
        separator: str = DEFAULT_SEPARATOR,
        per_line: bool = False,
        encoding_errors: str = "strict",
        remedy: str = ", or replace such bytes by U+FFFD with --data.encoding_errors replace",
    ):
        """Find the files.

        Args:
            patterns: Paths, folders and globs, see `find_files`.
            mapper: The mapping of rows to documents, which may depend on the first rows (see `resolved_mapper`); None:
                plain text in the column `text`.
            separator: Text files: a line that ends a document; empty: each file is one document.
            per_line: Text files: each line is a document.
            encoding_errors: Bytes that are not UTF-8: `strict` or `replace`, as in `bytes.decode`.
            remedy: For files that are not UTF-8, what a command offers besides converting them.

        Raises:
            UserError: A pattern matches no file, all files are empty, or a text file is to hold conversations.
        """
        self.name = patterns[0] if len(patterns) == 1 else f"{patterns[0]} and {len(patterns) - 1} more"
        self.files = find_files(patterns)
        if all(path.stat().st_size == 0 for path in self.files):
            if len(self.files) > 1:
                raise UserError(f"data.files: all {len(self.files)} files are empty")
            raise UserError(f"{self.files[0]} is empty")
        self._mapper = mapper or RowMapper()
        self._row_files = [path for path in self.files if file_format(path) in ROW_FORMATS]
        if isinstance(self._mapper, ConversationMapper) and len(self._row_files) < len(self.files):
            text = next(path for path in self.files if path not in self._row_files)
            raise UserError(
                f"data.format asks for conversations, but {text} is a text file: name JSONL, JSON or Parquet files only"
            )
        self.separator = separator
        self.per_line = per_line
        self.encoding_errors = encoding_errors
        self.remedy = remedy
        self._warned = False
        self._noted = False

    @cached_property
    def mapper(self) -> Mapper:
        """The mapping of rows to documents, as the first rows have decided."""
        if not self._row_files:
            return self._mapper
        return resolved_mapper(self._mapper, self._first_rows()).mapper

    def _first_rows(self) -> tuple[Any, ...]:
        path = self._row_files[0]
        state = path.stat()
        return _first_rows(path, state.st_size, state.st_mtime_ns)

    def describe(self) -> Any:
        """Return paths, sizes and times of modification of the files, and the options by which they are read.

        Options with their defaults are left out, as earlier versions left out all.
        """
        options: dict[str, Any] = {}
        if self._row_files and self.mapper.describe() != RowMapper().describe():
            options["columns"] = self.mapper.describe()
        if len(self._row_files) < len(self.files):
            if self.separator != DEFAULT_SEPARATOR:
                options["separator"] = self.separator
            if self.per_line:
                options["document"] = "line"
        if self.encoding_errors != "strict":
            options["encoding_errors"] = self.encoding_errors
        return [*describe_files(self.files), *([options] if options else [])]

    def read(self, position: Any = None) -> "FileReader":
        """Read from a position, see `FileReader.position`."""
        if self._row_files and not self._noted:
            self._noted = True
            if note := resolved_mapper(self._mapper, self._first_rows()).note:
                logger.info("%s: %s", self.name, note)
        return FileReader(self, position or [0, 0])

    def documents(self, path: Path) -> Iterator[Document | InvalidRow]:
        """Yield the documents of one file.

        Raises:
            UserError: The file cannot be read, is not UTF-8 text, or is a Parquet file that lacks a column.
        """
        kind = file_format(path)
        if kind not in ROW_FORMATS:
            with file_errors(path):
                for text in self._texts(path):
                    yield Document(text)
            return
        if kind == ".parquet":
            self._check_columns(path)
        for row in read_rows(path, self.encoding_errors):
            yield row if isinstance(row, InvalidRow) else self.mapper.to_document(row)

    def _check_columns(self, path: Path) -> None:
        columns = parquet_columns(path)
        missing = self.mapper.missing_column(columns)
        if missing:
            raise UserError(
                f"{path} has no column {missing} (columns: {', '.join(columns)}): name the column of the text with "
                "--data.text_field"
            )

    def _texts(self, path: Path) -> Iterator[str]:
        """Yield the documents of a text file, decoded one at a time."""
        with open_text(path) as file:
            yield from self._lines(file, path) if self.per_line else self._separated_texts(file, path)

    def _lines(self, file: IO[bytes], path: Path) -> Iterator[str]:
        """Yield the lines of a file."""
        separator = self.separator.encode()
        separators = 0
        offset = 0
        for number, line in enumerate(read_lines(file, path)):
            if separator and separator in line:
                separators += line.count(separator)
            yield self._decode(line.rstrip(b"\r\n"), path, offset, number)
            offset += len(line)
        if separators:
            where = "in the text, where it does not end a document: with data.document line each line is one"
            self._warn_of_separators(path, separators, where, "remove it, or leave out data.document")

    def _separated_texts(self, file: IO[bytes], path: Path) -> Iterator[str]:
        """Yield the documents between the separators of a file, which is read in blocks of whole lines."""
        separator = self.separator.encode()
        inline = 0  # separators among other text
        parts: list[bytes] = []  # of the current document
        document_offset = 0  # bytes before the document
        document_line = 0  # lines before the document
        size = 0  # bytes of the document
        for block in _read_blocks(file, path):
            start = 0
            at = block.find(separator) if separator else -1
            while at >= 0:
                line_start = block.rfind(b"\n", 0, at) + 1
                line_end = block.find(b"\n", at) + 1 or len(block)
                line = block[line_start:line_end]
                if line.strip() == separator:
                    parts.append(block[start:line_start])
                    data = b"".join(parts)
                    yield self._decode(data, path, document_offset, document_line)
                    document_offset += len(data) + len(line)
                    document_line += data.count(b"\n") + 1
                    start = line_end
                    parts = []
                    size = 0
                else:
                    inline += line.count(separator)
                at = block.find(separator, line_end)
            parts.append(block[start:])
            size += len(block) - start
            if size > MAX_DOCUMENT:
                raise too_long_error(path)
        if size:
            yield self._decode(b"".join(parts), path, document_offset, document_line)
        if inline:
            remedy = f"put each on a line of its own, as in sed 's/{self.separator}/\\n&\\n/g' OLD > NEW"
            self._warn_of_separators(path, inline, "among other text, where it does not end a document", remedy)

    def _warn_of_separators(self, path: Path, count: int, where: str, remedy: str) -> None:
        """Warn once of separators that are read as text: a source is read several times."""
        if not self._warned:
            self._warned = True
            logger.warning("%s: %s stands %s %s: %s", path, self.separator, plural(count, "time"), where, remedy)

    def _decode(self, data: bytes, path: Path, offset: int, lines: int) -> str:
        """Return the text of a document; a byte order mark at the beginning of the file is dropped.

        Args:
            data: The document's bytes.
            path: The file, for the error message.
            offset: Bytes of the file before the document.
            lines: Lines of the file before the document.
        """
        try:
            text = data.decode("utf-8", errors=self.encoding_errors)
        except UnicodeDecodeError as error:
            line = lines + data[: error.start].count(b"\n") + 1
            raise UserError(
                f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start} (line {line}). "
                f"Convert the file{self.remedy}"
            ) from None
        return text if offset else text.removeprefix("\ufeff")


class FileReader:
    """A `Reader` of a FileSource."""

    version = ""

    def __init__(self, source: FileSource, position: list[int]):
        """Start at a position, see `position`."""
        self._source = source
        self._position = list(position)

    def __iter__(self) -> Iterator[Document | InvalidRow]:
        first, done = self._position
        for index in range(first, len(self._source.files)):
            for number, item in enumerate(self._source.documents(self._source.files[index]), start=1):
                if number > done:
                    self._position = [index, number]
                    yield item
            done = 0

    def position(self) -> list[int]:
        """Return [index of the file, number of its documents and invalid rows that were read]."""
        return self._position


def _read_blocks(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Yield a file in blocks of whole lines.

    Raises:
        UserError: A line has more than `MAX_DOCUMENT` bytes.
    """
    while block := file.read(_BLOCK):
        if not block.endswith(b"\n"):
            block += file.readline(MAX_DOCUMENT + 1)
        if len(block) > MAX_DOCUMENT + _BLOCK:
            raise too_long_error(path)
        yield block


@lru_cache(maxsize=64)
def _first_rows(path: Path, size: int, modified: int) -> tuple[Any, ...]:
    """Return the values of the first rows of a file of this size and time of modification; none if it is damaged."""
    try:
        return tuple(
            row.value for row in itertools.islice(read_rows(path, "replace"), _FIRST_ROWS) if isinstance(row, Row)
        )
    except UserError:
        return ()  # reported when it is read
