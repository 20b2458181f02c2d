"""Documents in local files: text, JSONL and Parquet, also compressed."""

import glob
import gzip
import importlib
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from slm_jax.data.sources.documents import Document, InvalidRow, RowMapper
from slm_jax.utils.errors import UserError

ROWS = (".jsonl", ".ndjson", ".json", ".parquet")
PACKED = (".gz", ".xz", ".zst")
_IN_FOLDERS = (".txt", ".md", ".rst", *ROWS)  # what a folder is searched for; any file can be named


class FileSource:
    """The documents of files in the order of their names."""

    def __init__(
        self,
        patterns: tuple[str, ...],
        columns: RowMapper | None = None,
        separator: str = "<|endoftext|>",
        per_line: bool = False,
        encoding_errors: str = "strict",
    ):
        """separator: a line that ends a document ("": none). per_line: each line is a document. Raises UserError if a
        pattern names no file."""
        self.name = patterns[0] if len(patterns) == 1 else f"{patterns[0]} and {len(patterns) - 1} more"
        self.files = matching_files(patterns)
        if all(path.stat().st_size == 0 for path in self.files):
            many = f"data.files: all {len(self.files)} files are empty"
            raise UserError(many if len(self.files) > 1 else f"{self.files[0]} is empty")
        self.columns = columns or RowMapper()
        self.separator, self.per_line, self.encoding_errors = separator, per_line, encoding_errors

    def describe(self) -> Any:
        """Paths, sizes and times of the files."""
        return describe_files(self.files)

    def read(self, position: Any = None) -> "FileReader":
        """position: [index of the file, documents and rows of it that were read]."""
        return FileReader(self, position or [0, 0])

    def documents(self, path: Path) -> Iterator[Document | InvalidRow]:
        """Those of one file. Raises UserError if it cannot be read."""
        kind = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
        try:
            if kind == ".parquet":
                yield from parquet_rows(path, self.columns)
            elif kind in ROWS:
                yield from self._json(path)
            else:
                yield from (Document(text) for text in self._texts(path))
        except _damage() as error:
            raise UserError(f"{path} is damaged: {error}") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None

    def _texts(self, path: Path) -> Iterator[str]:
        end = self.separator.encode()
        lines: list[bytes] = []
        offset = number = begun = 0  # bytes and lines before this document
        with open_binary(path) as file:
            for at, line in enumerate(file, start=1):
                if self.per_line or (end and line.strip() == end):
                    text = b"".join(lines) if not self.per_line else line.rstrip(b"\r\n")
                    yield self._decode(text, path, offset, number)
                    offset, number, lines = begun + len(line), at, []
                else:
                    lines.append(line)
                begun += len(line)
        if lines:
            yield self._decode(b"".join(lines), path, offset, number)

    def _decode(self, data: bytes, path: Path, offset: int, lines: int) -> str:
        """The text of bytes that stand at an offset of a file; a byte order mark at its beginning is left out."""
        try:
            text = data.decode("utf-8", errors=self.encoding_errors)
        except UnicodeDecodeError as error:
            line = lines + data[: error.start].count(b"\n") + 1
            raise UserError(
                f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start} (line {line}). "
                "Convert the file, or put U+FFFD in place of such bytes with --data.encoding_errors replace"
            ) from None
        return text if offset else text.removeprefix("\ufeff")

    def _json(self, path: Path) -> Iterator[Document | InvalidRow]:
        with open_binary(path) as file:
            if path.name.removesuffix(path.suffix if path.suffix in PACKED else "").endswith(".json"):
                data = file.read()
                try:
                    rows = json.loads(data)
                except ValueError:  # then it is one object a line, as in .jsonl
                    yield from self._json_lines(data.splitlines(), path)
                    return
                for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
                    yield self.columns.to_document(row, f"{path} row {number}")
            else:
                yield from self._json_lines(file, path)

    def _json_lines(self, lines: Iterable[bytes], path: Path) -> Iterator[Document | InvalidRow]:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path} line {number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
                    yield InvalidRow("a line is no JSON", where)
                else:
                    yield self.columns.to_document(row, where)


class FileReader:
    """See `Reader`."""

    version = ""

    def __init__(self, source: FileSource, position: list[int]):
        self._source, self._position = source, list(position)

    def __iter__(self) -> Iterator[Document | InvalidRow]:
        first, done = self._position
        for index in range(first, len(self._source.files)):
            for number, what in enumerate(self._source.documents(self._source.files[index]), start=1):
                if number > done:
                    self._position = [index, number]
                    yield what
            done = 0

    def position(self) -> list[int]:
        """[index of the file, documents and rows of it that were read]."""
        return self._position


def parquet_rows(path: Path, columns: RowMapper) -> Iterator[Document | InvalidRow]:
    """The rows of a Parquet file. Raises UserError if pyarrow or a column is missing."""
    pyarrow = import_optional("pyarrow", "reading Parquet")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
        there = file.schema_arrow.names
        missing = [name for name in columns.required_columns() if name not in there]
        if missing:
            raise UserError(
                f"{path} has no column {missing[0]} (there: {', '.join(there)}): name the text's with --data.text_field"
            )
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield columns.to_document(row, f"{path} row {number}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no readable Parquet file: {error}") from None


def import_optional(module: str, purpose: str) -> Any:
    """An optional module. Raises UserError that names the extra it comes with."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"{purpose} needs {module}, which is not installed: it comes with the extra [data], in a clone "
            "pip install -e '.[data]', or by itself: pip install datasets pyarrow zstandard"
        ) from None


def open_binary(path: Path) -> IO[bytes]:
    """A file for reading, unpacked as its name says (.gz, .xz, .zst)."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_Zst(path), 1 << 20)
    return path.open("rb")


class _Zst(io.RawIOBase):
    """A .zst file of any number of frames; unlike the library's own reader it does not take a part for the whole."""

    def __init__(self, path: Path):
        self._new = import_optional("zstandard", f"reading {path.name}").ZstdDecompressor
        self._file, self._frame, self._data, self._packed = path.open("rb"), None, memoryview(b""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data:
            self._packed = self._packed or self._file.read(1 << 17)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle")
                return 0
            frame = self._frame or self._new().decompressobj()
            self._data = memoryview(frame.decompress(self._packed))
            self._packed, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        count = min(len(buffer), len(self._data))
        buffer[:count], self._data = self._data[:count], self._data[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _damage() -> tuple[type[Exception], ...]:
    """What unpacking raises on data that are no such archive, or only a part of one."""
    zstandard = sys.modules.get("zstandard")
    found = (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error)
    return (*found, zstandard.ZstdError) if zstandard else found


def describe_files(files: Iterable[Path]) -> Any:
    """[path, size, time of change] of each."""
    states = [(str(path.absolute()), path.stat()) for path in files]
    return sorted([path, state.st_size, state.st_mtime_ns] for path, state in states)


def matching_files(patterns: tuple[str, ...]) -> list[Path]:
    """The files that paths, folders and globs (`**` for any depth) name, each once, sorted. Raises UserError."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(name) for name in _glob(pattern)]
        files = [p for p in matches if p.is_file()]
        folders = [p for p in matches if p.is_dir()] if not files else []
        for folder in folders:
            files += [p for p in folder.rglob("*") if p.is_file() and _is_text(p)]
        if folders and not files:
            raise UserError(
                f"data.files: the folder {pattern} holds no {', '.join(_IN_FOLDERS)}: name its files, "
                f"as in '{pattern.rstrip('/')}/**/*.py'"
            )
        if not files:
            raise UserError(f"data.files: no file matches {pattern} (in {Path.cwd()})")
        found.update(files)
    return sorted(found)


def _is_text(path: Path) -> bool:
    name = path.name.removesuffix(path.suffix) if path.suffix in PACKED else path.name
    return name.endswith(_IN_FOLDERS) and not path.name.startswith(".")


def _glob(pattern: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_file() or path.is_dir():  # its name may hold [ or *
        return [str(path)]
    return glob.glob(str(path), recursive=True)  # noqa: PTH207  Path.glob takes none absolute
