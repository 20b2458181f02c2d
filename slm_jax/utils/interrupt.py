"""Ctrl-C in a command, at any instant between the start and the end of its process.

Python raises KeyboardInterrupt wherever the program happens to be. While modules are imported that ends in a traceback,
in another exception (extension modules convert it) or in a crash, and in a callback of the garbage collector it is
printed and lost. This module imports only what Python has loaded at its start.
"""

import signal
from types import FrameType

from tokenizer.streams import end_at_once

_RETRY_SECONDS = 0.02
_is_deferred = False  # whether a signal waits for the end of an import


def exit_on_interrupt() -> None:
    """Let Ctrl-C end the process at once: for the time before a command's `main`, and after it.

    Does nothing if SIGINT is ignored, as in the background of a shell script, or outside the main thread.
    """
    _install(_exit)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, but never inside an import or the garbage collector: for a command's `main`.

    Does nothing if SIGINT is ignored, or outside the main thread.
    """
    _install(_raise_outside_imports)


def _install(handler: object) -> None:
    ours = (signal.default_int_handler, _exit, _raise_outside_imports)
    if signal.getsignal(signal.SIGINT) not in ours:
        return
    try:
        signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]
    except ValueError:  # not in the main thread
        return


def _exit(number: int, frame: FrameType | None) -> None:
    end_at_once(b"stopped\n", 130)


def _raise_outside_imports(number: int, frame: FrameType | None) -> None:
    if _is_deferred and _must_not_raise(frame):  # pressed a second time
        _exit(number, frame)
    _raise_or_defer(number, frame)


def _raise_or_defer(number: int, frame: FrameType | None) -> None:
    global _is_deferred
    if not _must_not_raise(frame):
        _is_deferred = False
        raise KeyboardInterrupt
    _is_deferred = True
    previous = signal.signal(signal.SIGALRM, _retry)
    if previous not in (signal.SIG_DFL, _retry):  # in use by the program
        signal.signal(signal.SIGALRM, previous)
        _exit(number, frame)
    signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)


def _retry(number: int, frame: FrameType | None) -> None:
    if signal.getsignal(signal.SIGINT) is _raise_outside_imports:
        _raise_or_defer(number, frame)
    else:  # another handler has been installed since
        signal.raise_signal(signal.SIGINT)


def _must_not_raise(frame: FrameType | None) -> bool:
    """Return whether an import or a callback of the garbage collector is on the stack."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_name == "_xla_gc_callback":
            return True
        frame = frame.f_back
    return False
