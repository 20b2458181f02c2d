"""Checksums of a checkpoint's files: Orbax 0.12 and TensorStore have none of the bytes of arrays, and read a flipped
one without a word."""

import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

_NAME = "checksums.json"
_WRITTEN_LATER = {_NAME, "_CHECKPOINT_METADATA", "commit_success.txt"}  # by Orbax's commit; not needed to restore


class DamagedError(ValueError):
    """A file of a checkpoint is not what was written."""


def write(place: epath.Path) -> None:
    """Keep size and CRC-32 of every file of a folder in it."""
    with (place / _NAME).open("w") as file:
        json.dump(_checksums(place), file)
        file.flush()
        if not is_remote(place):
            os.fsync(file.fileno())


def verify(place: epath.Path) -> bool:
    """Raise DamagedError if a file of a checkpoint is missing, or is not what was written; False if it has no
    checksums, as those of this program's first version."""
    try:
        expected = json.loads((place / _NAME).read_text())
    except FileNotFoundError:
        return False
    found = _checksums(place)
    for name, value in expected.items():
        if found.get(name) != value:
            raise DamagedError(f"{name} {'differs from its checksum' if name in found else 'is missing'}")
    return True


def _checksums(place: epath.Path) -> dict[str, list[int]]:
    """{file: [bytes, CRC-32]}. It tells chance damage, not forgery; 1 GB a second and core."""
    files = sorted(_files(place, ""))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # crc32 lets go of the interpreter
        return dict(zip(files, pool.map(lambda name: _checksum(place / name), files), strict=True))


def _checksum(path: epath.Path) -> list[int]:
    size = value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, value = size + len(block), zlib.crc32(block, value)
    return [size, value]


def _files(place: epath.Path, prefix: str) -> Iterator[str]:
    for path in place.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        elif path.name not in _WRITTEN_LATER:
            yield prefix + path.name


def is_remote(place: epath.Path) -> bool:
    """Whether a path is of a bucket."""
    return "://" in str(place)
