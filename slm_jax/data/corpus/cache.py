"""The shared cache: corpora and tokenizers that are made once, for all runs.

CACHE/corpora/NAME-KEY/             a corpus (see `corpus`); the key is a hash of everything that it depends on
CACHE/corpora/NAME-KEY.partial/     a corpus that is being built, or whose build was interrupted
CACHE/corpora/NAME-KEY.parts-N/     parts of a corpus that are prepared by several processes (see `parts`)
CACHE/tokenizers/NAME-KEY.hybtok    a learned tokenizer
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_jax.config.paths import RUNS
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import locked_file, user_cache_folder

logger = logging.getLogger(__name__)

_MAX_COPY = 256 << 20  # bytes; a larger corpus on another file system is linked to rather than copied


def cache_folder(option: str = "") -> Path:
    """Return the folder of the cache.

    Args:
        option: The option `data.cache`; empty: `slm_jax/data` in the user's cache folder, or a folder next to the runs
            if that cannot be written to.
    """
    if option:
        return Path(option).expanduser()
    folder = user_cache_folder() / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return RUNS / ".cache"


def cache_key(value: Any) -> str:
    """Return a hash of a JSON value, 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def slug(name: str) -> str:
    """Return a name in the form that file names use."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:40] or "text"


@contextlib.contextmanager
def locked_entry(path: Path, content: str) -> Iterator[None]:
    """Hold the lock of an entry of the cache; waits while another process holds it.

    Args:
        path: The entry; the lock is a file next to it.
        content: What the entry holds, for the log.

    Raises:
        UserError: The cache cannot be written to.
    """

    def log_wait() -> None:
        logger.info("another process is preparing %s; waiting for it", content)

    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_file(path.with_name(path.name + ".lock"), log_wait))
        except OSError as error:
            raise UserError(
                f"cannot write to the cache {path.parent}: {error.strerror}. Use another folder: --data.cache"
            ) from None
        yield


def earlier_entries(entry: Path, source: Any, current: int) -> list[Path]:
    """Return the corpora of a source in the cache that earlier versions made.

    Args:
        entry: Where the source's corpus of this version is or will be.
        source: `Source.describe` of the source.
        current: The format of this version.
    """
    found = []
    for path in sorted(entry.parent.glob(f"{entry.name.rpartition('-')[0]}-*/manifest.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest["source"] == source and manifest["format"] < current:
                found.append(path.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged; not needed
    return found


def link_into_run(entry: Path, target: Path) -> None:
    """Put a corpus of the cache into a run's folder, completely or not at all.

    Uses hard links, which need no space and outlive the cache; on another file system a copy, or for a large corpus a
    symbolic link.

    Args:
        entry: The corpus in the cache.
        target: The folder to create.
    """
    partial = target.with_name(target.name + ".partial")
    remove_folder(partial)
    size = sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
    try:
        shutil.copytree(entry, partial, copy_function=os.link)
    except (OSError, shutil.Error):
        remove_folder(partial)
        if size <= _MAX_COPY or not _symlink(partial, entry):
            shutil.copytree(entry, partial)
    partial.rename(target)


def link_or_copy(file: Path, target: Path) -> None:
    """Create a hard link to a file, or a copy where the file system has no hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _symlink(link: Path, folder: Path) -> bool:
    """Create a symbolic link to a folder; return False if the file system does not support it."""
    try:
        link.symlink_to(folder.absolute(), target_is_directory=True)
    except OSError:
        return False
    return True


def remove_folder(path: Path) -> None:
    """Remove a folder, or a symbolic link to one, if it exists."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
