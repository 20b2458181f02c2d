"""Find local files, decompress them, and read the rows of JSON, JSON Lines and Parquet files."""

import contextlib
import glob
import gzip
import importlib
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from slm_jax.data.sources.documents import InvalidRow
from slm_jax.data.sources.optional import import_optional
from slm_jax.data.sources.rows import Row
from slm_jax.data.sources.sniffing import HEAD_SIZE, describe_binary
from slm_jax.utils.errors import UserError

ROW_FORMATS = (".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSED = (".gz", ".xz", ".zst")
_IN_FOLDERS = (".txt", ".md", ".rst", *ROW_FORMATS)  # read from a folder; other files must be named

_ROWS_AT_ONCE = 1000  # rows of a Parquet file that are converted to Python objects together
_ZST_READ = 1 << 17  # bytes of a .zst file that are read at once
_ZST_BUFFER = 1 << 20  # bytes


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths, folders and globs name.

    Args:
        patterns: Files, folders (searched for text and row files, also in linked folders) and globs (`**`: any depth).

    Returns:
        Each file once, sorted.

    Raises:
        UserError: A pattern is empty or matches no file.
    """
    result: set[Path] = set()
    for pattern in patterns:
        if not pattern.strip():  # Path("") is the current folder
            raise UserError("data.files: a path is empty (an unset variable of the shell?); the current folder is '.'")
        matches = [Path(name) for name in _expand(pattern)]
        files = [path for path in matches if path.is_file()]
        folders = [path for path in matches if path.is_dir()] if not files else []
        for folder in folders:
            files += [path for path in _walk(folder) if path.is_file() and _is_text(path)]
        if folders and not files:
            raise UserError(
                f"data.files: the folder {pattern} holds no {', '.join(_IN_FOLDERS)}: name its files, "
                f"as in '{pattern.rstrip('/')}/**/*.py'"
            )
        if not files:
            raise UserError(f"data.files: no file matches {pattern} (in {Path.cwd()})")
        result.update(files)
    return sorted(result)


def _expand(pattern: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_file() or path.is_dir():  # the name of an existing file may contain [ or *
        return [str(path)]
    return glob.glob(str(path), recursive=True)  # noqa: PTH207  Path.glob does not accept absolute patterns


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, linked folders included; each folder once, so that cyclic links end."""
    visited: set[str] = set()
    pending = [str(folder)]
    while pending:
        for parent, subfolders, names in os.walk(pending.pop(0)):
            real_path = os.path.realpath(parent)
            if real_path in visited:
                subfolders.clear()
                continue
            visited.add(real_path)
            links = (Path(parent, name) for name in sorted(subfolders))
            pending += [str(link) for link in links if link.is_symlink()]  # os.walk does not follow them
            yield from (Path(parent, name) for name in names)


def _is_text(path: Path) -> bool:
    return file_format(path) in _IN_FOLDERS and not path.name.startswith(".")


def file_format(path: Path) -> str:
    """Return the suffix of a file in lower case, without that of its compression: `.jsonl` for A.JSONL.gz."""
    return (path.with_suffix("") if _compression(path) else path).suffix.lower()


def _compression(path: Path) -> str:
    """Return the suffix of a file's compression in lower case; empty: it has none."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSED else ""


def describe_files(files: Iterable[Path]) -> Any:
    """Return [path, bytes, time of modification in ns] of each file."""
    states = [(str(path.absolute()), path.stat()) for path in files]
    return sorted([path, state.st_size, state.st_mtime_ns] for path, state in states)


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Convert errors of reading a file into a UserError that names it."""
    try:
        yield
    except _decompression_errors() as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _decompression_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions for data that are not a valid archive, or only a part of one."""
    zstandard = sys.modules.get("zstandard")
    errors = (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error)
    return (*errors, zstandard.ZstdError) if zstandard else errors


def read_rows(path: Path) -> Iterator[Row | InvalidRow]:
    """Yield the rows of a JSON, JSON Lines or Parquet file, which may be compressed.

    A `.json` file holds a list of rows, a single row, or one row per line.

    Args:
        path: A file whose `file_format` is one of `ROW_FORMATS`.

    Yields:
        Rows in the order of the file; an InvalidRow for a line that is not valid JSON.

    Raises:
        UserError: The file is damaged, binary or cannot be read, or the library for its format is not installed.
    """
    kind = file_format(path)
    with file_errors(path):
        if kind == ".parquet":
            yield from _parquet_rows(path)
        elif kind == ".json":
            yield from _json_rows(path)
        else:
            with open_text(path) as file:
                yield from _json_lines(file, path)


def parquet_columns(path: Path) -> list[str]:
    """Return the names of the columns of a Parquet file.

    Raises:
        UserError: The file is not valid Parquet or cannot be read, or pyarrow is not installed.
    """
    with file_errors(path), _parquet_file(path) as file:
        return list(file.schema_arrow.names)


def _parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    with _parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            for value in batch.to_pylist():
                number += 1
                yield Row(value, f"{path} row {number}")


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    pyarrow = import_optional("pyarrow", "reading Parquet")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        yield parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a valid Parquet file: {error}") from None


def _json_rows(path: Path) -> Iterator[Row | InvalidRow]:
    with open_binary(path) as file:
        data = file.read()
    try:
        rows = json.loads(data)
    except ValueError:  # one object per line, as in .jsonl
        _check_text(path, data[:HEAD_SIZE])
        yield from _json_lines(data.splitlines(), path)
        return
    if not isinstance(rows, list):
        rows = [rows]
    for number, value in enumerate(rows, start=1):
        yield Row(value, f"{path} row {number}")


def _json_lines(lines: Iterable[bytes], path: Path) -> Iterator[Row | InvalidRow]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        location = f"{path} line {number}"
        try:
            yield Row(json.loads(line), location)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            yield InvalidRow("a line is not valid JSON", location)


def open_text(path: Path) -> IO[bytes]:
    """Open a text file as `open_binary` does.

    Raises:
        UserError: Its beginning is not UTF-8 text but UTF-16, an archive, or other binary data.
    """
    with open_binary(path) as file:
        _check_text(path, file.read(HEAD_SIZE))
    return open_binary(path)


def _check_text(path: Path, head: bytes) -> None:
    """Raise UserError if the beginning of a file is not UTF-8 text."""
    if found := describe_binary(head):
        name, remedy = found
        content = " once decompressed" if _compression(path) else ""
        raise UserError(f"{path} is not UTF-8 text{content}: it looks like {name}; {remedy}")


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed according to its suffix (.gz, .xz, .zst)."""
    compression = _compression(path)
    if compression == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if compression == ".xz":
        return lzma.open(path, "rb")
    if compression == ".zst":
        return io.BufferedReader(_ZstFile(path), _ZST_BUFFER)
    return path.open("rb")


class _ZstFile(io.RawIOBase):
    """A .zst file of any number of frames; unlike the library's reader it raises EOFError on a truncated one."""

    def __init__(self, path: Path):
        self._new_frame = import_optional("zstandard", f"reading {path.name}").ZstdDecompressor
        self._file = path.open("rb")
        self._frame: Any = None  # decompressor of the current frame
        self._compressed = b""  # read from the file, not yet decompressed
        self._data = memoryview(b"")  # decompressed, not yet returned

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data:
            self._compressed = self._compressed or self._file.read(_ZST_READ)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            frame = self._frame or self._new_frame().decompressobj()
            self._data = memoryview(frame.decompress(self._compressed))
            if frame.eof:
                self._compressed = frame.unused_data
                self._frame = None
            else:
                self._compressed = b""
                self._frame = frame
        count = min(len(buffer), len(self._data))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
