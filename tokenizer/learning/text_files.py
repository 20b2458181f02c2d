"""Find and read text files given by paths and glob patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizer.errors import TokenizerError


def find_files(patterns: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return the files that match paths or glob patterns, each once.

    Args:
        patterns: One or several paths or patterns; ``**`` matches folders of any depth.

    Returns:
        Paths in the order of the patterns; the matches of one pattern are sorted.

    Raises:
        TokenizerError: A pattern matches no file, or all files are empty.
    """
    if isinstance(patterns, str | os.PathLike):
        patterns = [patterns]
    paths: list[str] = []
    for pattern in patterns:
        name = str(Path(pattern).expanduser())
        if Path(name).is_file():  # the name of a file may contain [ or *
            matches = [name]
        else:
            matches = glob.glob(name, recursive=True)  # noqa: PTH207  # Path.glob refuses absolute patterns
        files = sorted(match for match in matches if Path(match).is_file())
        if not files and any(Path(match).is_dir() for match in matches):
            raise TokenizerError(f"{name} is a folder: name its files, as in '{name.rstrip('/')}/**/*.txt'")
        if not files:
            raise TokenizerError(f"no file matches {name} (in {Path.cwd()})")
        paths += files
    paths = list(dict.fromkeys(paths))
    if all(Path(path).stat().st_size == 0 for path in paths):
        raise TokenizerError(f"all {len(paths)} files are empty" if len(paths) > 1 else f"{paths[0]} is empty")
    return paths


def decode_utf8(data: bytes, name: str) -> str:
    """Decode UTF-8 text; `name` is used in the error message.

    Raises:
        TokenizerError: The data is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{name} is not UTF-8 text (byte {error.start})") from None


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file without translating line ends.

    Raises:
        TokenizerError: The file cannot be read or is not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror}") from None
    return decode_utf8(data, str(path))
