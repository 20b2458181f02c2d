"""SIGINT and SIGTERM end training after the current step."""

import contextlib
import os
import signal
import sys
from typing import Any

from slm_jax.distributed import multihost


def _end_process(number: int, _: Any) -> None:
    # Not by an exception: the interrupted code may take it for another one (NumPy does), or wait for a thread.
    os.write(2, b"\nstopped; the last checkpoint is complete: run the same command again to resume\n")
    os._exit(128 + number)


class StopSignals:
    """Handlers of SIGINT and SIGTERM; a context manager.

    A first signal asks the loop to stop after the current step. A second one ends the process at once; in a notebook
    it acts as it would without these handlers. With several processes, a SIGTERM to any of them stops all after the
    same step, by JAX's preemption service.

    Attributes:
        signal: The signal that was received; None without any.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def requested(self, step: int) -> bool:
        """Return whether to stop after a step. With several processes all must ask for every step."""
        if multihost.process_count() > 1 and multihost.stop_requested(step):
            self.signal = int(signal.SIGTERM)
        return self.signal is not None

    def __enter__(self) -> "StopSignals":
        numbers = (signal.SIGINT, signal.SIGTERM) if multihost.process_count() == 1 else (signal.SIGINT,)
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
            signal.signal(each, handler if is_notebook else _end_process)
        # print and logging are not safe in a signal handler.
        os.write(2, b"\nfinishing the step and saving; a second Ctrl-C stops at once\n")
        if multihost.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # for JAX's handler, which tells the other processes
        else:
            self.signal = number
