"""The one exception for a user's mistake, and how a command ends on it."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can mend: the text says what was found, what was expected and what to do."""


@contextmanager
def command_line() -> Iterator[None]:
    """How a command ends: on a UserError or a full disk with its text and status 2, on Ctrl-C with 130.

    Everything else is ours to mend and keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end("stopped", 130)
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        if (text := explain(error)) is None:
            raise
        _end(f"error: {text}", 2)


def explain(error: Exception) -> str | None:
    """What the user is told of an error that they can mend; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if is_disk_full(error):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return f"no space left on the disk{where}: free some and give the same command again"
    return None


def _end(text: str, status: int) -> None:
    print(text, file=sys.stderr)
    raise SystemExit(status) from None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk or quota (some libraries wrap it as text)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
