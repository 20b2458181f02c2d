"""Errors that the user can correct, and their messages."""

import errno
import os
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can correct; the text states what was found, what was expected and what to do."""


class TrainingError(UserError):
    """Training failed because of its own options (it diverged, or needs more memory): others may succeed."""


def user_message(error: Exception) -> str | None:
    """Return the message for an error that the user can correct, None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if problem := disk_problem(error):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return f"{problem}{where}; then give the same command again"
    if isinstance(error, OSError) and error.errno in _REFUSED and error.filename:
        return f"cannot use {error.filename}: {error.strerror}; change its permissions, or name another place"
    return _missing_device(error)


def _missing_device(error: Exception) -> str | None:
    """Return the message for JAX's error about a requested platform that is not available."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or Path(trace.tb_frame.f_code.co_filename).name != "xla_bridge.py":
        return None
    # Without the plugin of a platform (cuda) JAX fails with an assertion, otherwise with a RuntimeError.
    if not isinstance(error, AssertionError | RuntimeError):
        return None
    variable = next((name for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(name)), "")
    reason = str(error).strip().partition("\n")[0].partition(" (set JAX_PLATFORMS")[0] or "its plugin is not installed"
    if not variable:
        return f"JAX finds no device ({reason})"
    return (
        f"{variable}={os.environ[variable]}: JAX cannot use such a device here ({reason}). Unset {variable} to use the "
        f"devices that there are, or install their support: pip install -U 'jax[cuda12]' or 'jax[tpu]'"
    )


_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_DISK_PROBLEMS = {
    errno.ENOSPC: "no space left on the disk: free some",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "a file would be larger than allowed: raise the limit (ulimit -f), or use another file system",
}


def disk_problem(error: BaseException | None) -> str | None:
    """Return the problem and its remedy if an error or one of its causes is a full disk, a quota or a size limit.

    Some libraries (TensorStore) raise their own errors with the system's message as text.
    """
    while error is not None:
        for number, problem in _DISK_PROBLEMS.items():
            if (isinstance(error, OSError) and error.errno == number) or os.strerror(number) in str(error):
                return problem
        error = error.__cause__ or error.__context__
    return None


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes is a full disk, a quota or a limit of file sizes."""
    return disk_problem(error) is not None
