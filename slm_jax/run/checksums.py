"""Checksums of a checkpoint's files.

Orbax 0.12 and TensorStore store none for the bytes of arrays: a flipped bit is read without an error.
"""

import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

CHECKSUMS = "checksums.json"
"""Name of the file."""

_PART = "checksums.part-"  # of one process, while a checkpoint is being written
_WRITTEN_LATER = {CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt"}  # by Orbax's commit; not needed to restore


class DamagedError(ValueError):
    """A file of a checkpoint differs from what was written."""


def write_part(folder: epath.Path, arrays: epath.Path, process: int) -> None:
    """Write the checksums of the array data that one of several processes has written, for `write`.

    Each process reads what it has written itself, from its own page cache or at its share of the traffic to a bucket.

    Args:
        folder: The checkpoint that is being written.
        arrays: The folder of its item "state", which may have a temporary name.
        process: The number of the process.
    """
    prefix = f"ocdbt.process_{process}/d/"  # OCDBT never changes these files, and merging refers to them
    path = arrays / prefix
    names = list(_files(path, prefix)) if path.exists() else []
    table = {f"state/{name}": values for name, values in _checksums(arrays, names).items()}
    (folder / f"{_PART}{process}").write_text(json.dumps(table))


def write(folder: epath.Path) -> None:
    """Write the size and CRC-32 of every file of a folder to `checksums.json` in it; uses those of `write_part`."""
    table: dict[str, list[int]] = {}
    for path in [path for path in folder.iterdir() if path.name.startswith(_PART)]:
        table |= json.loads(path.read_text())
        path.unlink()
    names = sorted(_files(folder, ""))
    table |= _checksums(folder, [name for name in names if name not in table])
    with (folder / CHECKSUMS).open("w") as file:
        json.dump({name: table[name] for name in names}, file)
        file.flush()
        if not is_remote(folder):
            os.fsync(file.fileno())


def verify(folder: epath.Path, part: tuple[int, int] = (0, 1)) -> bool:
    """Verify the files of a checkpoint: the size of each, and the CRC-32 of a part of them.

    Args:
        folder: The checkpoint.
        part: (index, count): which part this is of how many, whose files are about equally large together. The parts
            of all processes are all files.

    Returns:
        True if they are what was written; False if there is no file of checksums.

    Raises:
        DamagedError: A file is missing or differs from its checksum.
    """
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
    except FileNotFoundError:
        return False
    sizes = {name: (folder / name).stat().length for name in _files(folder, "")}
    for name, (size, _) in expected.items():
        if name not in sizes:
            raise DamagedError(f"{name} is missing")
        if sizes[name] != size:
            raise DamagedError(f"{name} has {sizes[name]} bytes, not {size}")
    files = _part(expected, *part)
    actual = _checksums(folder, files)
    for name in files:
        if actual[name] != expected[name]:
            raise DamagedError(f"{name} differs from its checksum")
    return True


def _part(table: dict[str, list[int]], index: int, count: int) -> list[str]:
    """Return the files of one of several parts of a table: each file, largest first, goes to the smallest part."""
    parts: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for name in sorted(table, key=lambda name: (-table[name][0], name)):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(name)
        sizes[smallest] += table[name][0]
    return parts[index]


def _checksums(folder: epath.Path, files: list[str]) -> dict[str, list[int]]:
    """Return {file: [bytes, CRC-32]}: detects accidental damage, not forgery, at 1 GB a second per core."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # zlib.crc32 releases the interpreter's lock
        return dict(zip(files, pool.map(lambda name: _checksum(folder / name), files), strict=True))


def _checksum(path: epath.Path) -> list[int]:
    size = 0
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]


def _files(folder: epath.Path, prefix: str) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        elif path.name not in _WRITTEN_LATER:
            yield prefix + path.name


def is_remote(path: epath.Path) -> bool:
    """Return whether a path is of a bucket."""
    return "://" in str(path)
