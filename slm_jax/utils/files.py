"""Files: written as a whole or not at all, locked against other processes, and the user's cache folder."""

import contextlib
import fcntl
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

PARTIAL = ".partial"  # suffix of files that are being written; what a killed process leaves may be deleted


def user_cache_folder() -> Path:
    """Return the project's folder in the user's cache (prepared text, compiled programs); it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slm_jax"


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Write a file so that at every instant it holds either the old or the new content as a whole.

    The name of the temporary file is random, so that two processes never write into the same one.

    Args:
        path: The file to write or replace; its folder must exist.

    Yields:
        The path of a temporary file in the same folder. It takes the place of `path` when the block ends, and is
        deleted if the block raises.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) as a whole or not at all, see `replace_file`."""
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def is_partial(path: Path) -> bool:
    """Return whether a path is a temporary file of `replace_file`."""
    return path.name.endswith(PARTIAL)


@contextlib.contextmanager
def locked_folder(folder: Path, activity: str, option: str) -> Iterator[None]:
    """Hold the lock of a folder, which is created if missing.

    Args:
        folder: The folder; the lock is a file `.lock` in it.
        activity: What the holder of the lock does, for the error message: "training runs/A".
        option: The option that names the folder, for the error message: "--run".

    Raises:
        UserError: Another process holds the lock, or the folder cannot be written to.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, not a folder: use another {option}")
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    with handle:
        try:
            _flock(handle.fileno(), folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is {activity}: wait for it, or use another {option}") from None
        yield


@contextlib.contextmanager
def locked_file(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[int]:
    """Open a file for appending and hold its lock; waits while another process holds it.

    Args:
        path: The file, created if missing; its folder must exist.
        on_wait: Called once if the lock is not free, before waiting.

    Yields:
        The file descriptor.

    Raises:
        OSError: The file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            _flock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            _flock(descriptor, path, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether another process, or another block of this one, holds the lock of a file, see `locked_file`.

    Raises:
        OSError: The file cannot be opened.
    """
    with path.open("a") as file:
        try:
            _flock(file.fileno(), path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _flock(descriptor: int, path: Path, operation: int) -> None:
    """Lock with flock(2); warn where the file system does not support it.

    Raises:
        BlockingIOError: The lock is not free and `operation` has LOCK_NB.
    """
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError as error:  # some network file systems have no locks
        logger.warning("cannot lock %s (%s): let no other process write to it", path, error.strerror)
