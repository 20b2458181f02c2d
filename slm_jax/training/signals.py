"""SIGINT, SIGTERM and SIGHUP (the terminal was closed) end training after the current step."""

import contextlib
import os
import signal
import stat
import sys
from typing import Any

from slm_jax.distributed import multihost
from tokenizer.streams import end_at_once, write_last


def _leave_closed_terminal() -> None:
    """Redirect standard output and error to nowhere if they are a terminal: from its end on every write fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # isatty is false for one that is closed already
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _end_process(number: int, _: Any) -> None:
    # Not by an exception: the interrupted code may take it for another one (NumPy does), or wait for a thread.
    message = b"\nstopped; the last checkpoint is complete: run the same command again to resume\n"
    end_at_once(message, 128 + number)


class StopSignals:
    """Handlers of SIGINT, SIGTERM and SIGHUP; a context manager.

    A first signal asks the loop to stop after the current step. A second one ends the process at once; in a notebook
    it acts as it would without these handlers. SIGHUP never is a second one, since a closed terminal and a logout send
    it along with others; where it is ignored (nohup) it stays ignored. With several processes, a SIGTERM to any of them
    stops all after the same step, by JAX's preemption service.

    Attributes:
        signal: The signal that was received; None without any.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def requested(self) -> bool:
        """Return whether to stop now. With several processes all must ask after every step."""
        if multihost.process_count() > 1 and multihost.stop_requested():
            self.signal = int(signal.SIGTERM)
        return self.signal is not None

    def __enter__(self) -> "StopSignals":
        numbers: tuple[int, ...] = (
            (signal.SIGINT, signal.SIGTERM) if multihost.process_count() == 1 else (signal.SIGINT,)
        )
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            numbers = (*numbers, signal.SIGHUP)
        with contextlib.suppress(ValueError):  # not in the main thread, which then decides
            for number in map(int, numbers):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: Any) -> None:
        is_notebook = "ipykernel" in sys.modules or hasattr(sys, "ps1")
        for each, handler in self._previous.items():
            if each == signal.SIGHUP:
                signal.signal(each, signal.SIG_IGN)
            else:
                signal.signal(each, handler if is_notebook else _end_process)
        write_last(b"\nfinishing the step and saving; a second Ctrl-C stops at once\n")
        if number == signal.SIGHUP:
            _leave_closed_terminal()
        if multihost.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # for JAX's handler, which tells the other processes
        else:
            self.signal = number
