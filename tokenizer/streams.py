"""Standard streams of a command, where some are closed or cannot be written, as on a full disk.

Both packages use it, before they import anything else: it imports only what Python has loaded at its start.
"""

import os
import sys

TYPE_CHECKING = False  # as type checkers know it: `typing` takes 10 ms to import, in which Ctrl-C prints a traceback
if TYPE_CHECKING:
    from typing import NoReturn


def open_closed_streams() -> None:
    """Open the null device in place of closed standard streams, which Python represents by None.

    Otherwise printing fails, and a file that is opened later gets the number of the stream, to which libraries write.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, PTH123
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def print_last(text: str) -> None:
    """Print the text that a command ends with on stderr, if that can be written: the exit status is the same."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return


def write_last(message: bytes) -> None:
    """Write the message that a process ends with to stderr, if that can be written; for signal handlers too.

    Printing is not safe in a signal handler.
    """
    try:
        os.write(2, message)
    except OSError:
        return


def end_at_once(message: bytes, status: int) -> "NoReturn":
    """End the process from a signal handler, with a message on stderr if that can be written."""
    write_last(message)
    os._exit(status)


def discard_unwritable_output() -> None:
    """Write what is left of the output; open the null device in place of a stream that cannot be written.

    Otherwise Python fails at it once more when it ends, and changes the exit status to 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
