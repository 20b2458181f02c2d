"""Standard streams of a process that was started with some of them closed."""

import os
import sys


def open_closed_streams() -> None:
    """Open the null device in place of closed standard streams, which Python represents by None.

    Otherwise printing fails, and a file that is opened later gets the number of the stream, to which libraries write.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, PTH123
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
