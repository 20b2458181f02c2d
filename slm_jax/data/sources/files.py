"""Find local files, and open them: decompressed, and checked to be text."""

import contextlib
import functools
import glob
import gzip
import io
import lzma
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from slm_jax.data.sources.sniffing import HEAD_SIZE, describe_binary
from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import import_optional

ROW_FORMATS = (".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSED = (".gz", ".xz", ".zst")
_IN_FOLDERS = (".txt", ".md", ".rst", *ROW_FORMATS)  # read from a folder; other files must be named
_LOST_AND_FOUND = "lost+found"  # at the root of a file system, closed to users: repaired fragments, no texts

MAX_DOCUMENT = 2 << 30  # bytes; a longer text or line is refused before it is read as a whole
MAX_EXPANSION = 300  # a compressed file may have so many times its size; text has about 3 to 10 times
_ALWAYS_ALLOWED = 64 << 20  # bytes of a decompressed file that are not compared with its compressed size

_ZST_READ = 1 << 10  # bytes of a .zst file that are decompressed together, to at most 32 MB
_BUFFER = 1 << 20  # bytes that are decompressed together


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
    """Yield the files below a folder, linked folders included; each folder once, so that cyclic links end.

    Raises:
        UserError: A folder cannot be read; `os.walk` would leave it out.
    """
    visited: set[str] = set()
    pending = [str(folder)]
    while pending:
        for parent, subfolders, names in os.walk(pending.pop(0), onerror=_raise_unreadable):
            real_path = os.path.realpath(parent)
            if real_path in visited:
                subfolders.clear()
                continue
            visited.add(real_path)
            subfolders[:] = [name for name in subfolders if name != _LOST_AND_FOUND]
            links = (Path(parent, name) for name in sorted(subfolders))
            pending += [str(link) for link in links if link.is_symlink()]  # os.walk does not follow them
            yield from (Path(parent, name) for name in names)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise UserError(
        f"data.files: cannot read the folder {error.filename}: {error.strerror}; change its permissions, or name the "
        f"files and folders beside it"
    ) from None


def _is_text(path: Path) -> bool:
    return file_format(path) in _IN_FOLDERS and not path.name.startswith(".")


def file_format(path: Path) -> str:
    """Return the suffix of a file in lower case, without that of its compression: `.jsonl` for A.JSONL.gz."""
    return (path.with_suffix("") if _compression(path) else path).suffix.lower()


def _compression(path: Path) -> str:
    """Return the suffix of a file's compression in lower case; empty: it has none."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSED else ""


def is_compressed(path: Path) -> bool:
    """Return whether a file has the suffix of a compression."""
    return bool(_compression(path))


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


def open_text(path: Path) -> IO[bytes]:
    """Open a text file as `open_binary` does.

    Raises:
        UserError: Its beginning is not UTF-8 text but UTF-16, an archive, or other binary data.
    """
    with open_binary(path) as file:
        check_text(path, file.read(HEAD_SIZE))
    return open_binary(path)


def check_text(path: Path, head: bytes) -> None:
    """Check the beginning of a file.

    Raises:
        UserError: It is not UTF-8 text.
    """
    if found := describe_binary(head):
        name, remedy = found
        content = " once decompressed" if _compression(path) else ""
        raise UserError(f"{path} is not UTF-8 text{content}: it looks like {name}; {remedy}")


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed according to its suffix (.gz, .xz, .zst).

    Reading raises UserError where a compressed file has more than `MAX_EXPANSION` times its size: a megabyte can stand
    for a gigabyte of equal bytes, which would fill the memory.
    """
    compression = _compression(path)
    if not compression:
        return path.open("rb")
    file: Any
    if compression == ".gz":
        file = gzip.open(path, "rb")  # noqa: SIM115  closed by the reader
    elif compression == ".xz":
        file = lzma.open(path, "rb")  # noqa: SIM115
    else:
        file = _ZstFile(path)
    return io.BufferedReader(_BoundedFile(file, path), _BUFFER)


def read_lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, with their ends.

    Raises:
        UserError: A line has more than `MAX_DOCUMENT` bytes.
    """
    for line in iter(functools.partial(file.readline, MAX_DOCUMENT + 1), b""):
        if len(line) > MAX_DOCUMENT:
            raise too_long_error(path)
        yield line


def too_long_error(path: Path) -> UserError:
    """Return the error for a line or a document of more than `MAX_DOCUMENT` bytes."""
    return UserError(
        f"{path} has a document of more than {MAX_DOCUMENT / 1e9:.1f} GB, which is read as a whole: divide it into "
        "files, by lines with the text of --data.separator, or with --data.document line"
    )


class _BoundedFile(io.RawIOBase):
    """A decompressed file that ends with an error where it is too large for its compressed size."""

    def __init__(self, file: Any, path: Path):
        self._file = file
        self._path = path
        self._remaining = max(_ALWAYS_ALLOWED, MAX_EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)
        self._remaining -= count
        if self._remaining < 0:
            raise UserError(
                f"{self._path} decompresses to more than {MAX_EXPANSION} times its size, as files do that are made to "
                "fill the memory: if its content is right, unpack it and name the result"
            )
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


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
