"""The shared cache: corpora and tokenizers that were made once, for all runs.

CACHE/corpora/NAME-KEY/        a corpus (see `corpus`); the key is made of everything that it depends on
CACHE/corpora/NAME-KEY.partial/  one that is being made, or was when its process was killed
CACHE/tokenizers/NAME-KEY.hybtok
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_jax.config.paths import RUNS
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import user_cache_folder

_COPIED = 256 << 20  # bytes; a larger corpus on another file system is linked to rather than copied


def cache_folder(option: str = "") -> Path:
    """`data.cache`, or else `slm_jax/data` in the user's cache folder, or beside the runs where none can be written."""
    if option:
        return Path(option).expanduser()
    folder = user_cache_folder() / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return RUNS / ".cache"


def key_of(value: Any) -> str:
    """12 hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:40] or "text"


@contextlib.contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Held while a process makes what will be at a path; others wait. Raises UserError where nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.with_name(path.name + ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {path.parent}: {error.strerror}. Another folder: --data.cache"
        ) from None
    with handle:
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is preparing {what}; waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            print(f"cannot lock {path} ({error.strerror}): prepare {what} in one process only", file=sys.stderr)
        yield


def give_to_run(entry: Path, target: Path) -> None:
    """Put a corpus of the cache into a run's folder, whole or not at all: by hard links, which take no room and outlive
    the cache; on another file system by a copy, or for a large one by a symbolic link."""
    partial = target.with_name(target.name + ".partial")
    discard(partial)
    size = sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
    try:
        shutil.copytree(entry, partial, copy_function=os.link)
    except (OSError, shutil.Error):
        discard(partial)
        try:
            if size <= _COPIED:
                raise OSError
            partial.symlink_to(entry.absolute(), target_is_directory=True)
        except OSError:
            shutil.copytree(entry, partial)
    partial.rename(target)


def discard(path: Path) -> None:
    """Remove a folder, or a link to one, if it is there."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
