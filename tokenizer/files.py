"""Which files paths and glob patterns mean."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizer.errors import TokenizerError


def matching_files(patterns: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """The files that paths and globs (`**` for any depth) name, each once; those of one pattern sorted.

    Raises TokenizerError where a pattern has none, or where all files are empty.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str | os.PathLike) else patterns:
        name = str(Path(pattern).expanduser())
        # A file's name may hold [ or *. Path.glob takes no absolute pattern.
        matches = [name] if Path(name).is_file() else glob.glob(name, recursive=True)  # noqa: PTH207
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
