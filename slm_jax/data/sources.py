"""Documents by name: each source yields the texts of its documents, in a fixed order."""

import glob
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_jax.config import DataConfig
from slm_jax.data import python_docs
from slm_jax.errors import UserError


def documents(config: DataConfig) -> Iterator[str]:
    """The documents that the config names, none empty. Raises UserError for what cannot be read."""
    texts = python_docs.documents() if config.source == "python-docs" else _local(config)
    return (text for text in texts if text.strip())


def describe_source(config: DataConfig) -> Any:
    """What tells one state of the text from another: sizes and times of the files, or Python's version. JSON."""
    if config.source == "python-docs":
        return platform.python_version()
    found = (Path(name) for pattern in config.files for name in _glob(pattern))
    return sorted([str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in found if path.is_file())


def _glob(pattern: str) -> list[str]:
    if Path(pattern).expanduser().is_file():  # its name may hold [ or *
        return [str(Path(pattern).expanduser())]
    return glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207  Path.glob takes none absolute


def matching_files(patterns: tuple[str, ...]) -> list[Path]:
    """The files that paths and globs (`**` for any depth) name, each once, sorted. Raises UserError if one has none."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(name) for name in _glob(pattern)]
        files = [p for p in matches if p.is_file()]
        if not files and matches:
            raise UserError(
                f"data.files: {pattern} is a folder: name its files, as in '{pattern.rstrip('/')}/**/*.txt'"
            )
        if not files:
            raise UserError(f"data.files: no file matches {pattern} (in {Path.cwd()})")
        found.update(files)
    return sorted(found)


def _local(config: DataConfig) -> Iterator[str]:
    files = matching_files(config.files)
    if all(path.stat().st_size == 0 for path in files):
        raise UserError(f"data.files: all {len(files)} files are empty" if len(files) > 1 else f"{files[0]} is empty")
    for path in files:
        yield from _split(read_text(path, config.encoding_errors), config.separator)


def read_text(path: Path, encoding_errors: str = "strict") -> str:
    """A file's text, byte order mark removed, line ends as they are. Raises UserError at the first byte not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8", errors=encoding_errors).removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start} (line {line}). "
            "Convert the file, or put U+FFFD in place of such bytes with --data.encoding_errors replace"
        ) from None


def _split(text: str, separator: str) -> Iterator[str]:
    """The documents of a file: split at lines that hold just the separator."""
    if not separator:
        yield text
        return
    document: list[str] = []
    for line in text.splitlines(keepends=True) if separator in text else (text,):
        if line.strip() == separator:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)
