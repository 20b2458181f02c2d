"""When a run ends before its last step: signals."""

import contextlib
import os
import signal
import sys
from typing import Any

from slm_jax.distributed import multihost


def _end_at_once(number: int, _: Any) -> None:
    # Not by an exception: code that is interrupted may take it for another one (NumPy does), or wait for a thread.
    os.write(2, b"\nstopped; the last checkpoint is whole, the same command goes on after it\n")
    os._exit(128 + number)


class Stop:
    """Whether to end after the step in hand: SIGINT or SIGTERM came. A second one ends the process at once, but in a
    notebook, where it acts as it would without us.

    Of several processes a SIGTERM to any one ends all of them after the same step, by JAX's own handler for it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # the one that came
        self._before: dict[int, Any] = {}

    def __call__(self, step: int) -> bool:
        if multihost.process_count() > 1 and multihost.stop_requested(step):
            self.signal = int(signal.SIGTERM)
        return self.signal is not None

    def __enter__(self) -> "Stop":
        numbers = (signal.SIGINT, signal.SIGTERM) if multihost.process_count() == 1 else (signal.SIGINT,)
        with contextlib.suppress(ValueError):  # not the main thread: whoever owns it decides
            for number in map(int, numbers):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        is_notebook = "ipykernel" in sys.modules or hasattr(sys, "ps1")
        for each, handler in self._before.items():
            signal.signal(each, handler if is_notebook else _end_at_once)
        os.write(2, b"\nfinishing the step and saving; once more to stop at once\n")  # print is not safe in a handler
        if multihost.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal = number
