"""Long operations: a line that counts their seconds, and Ctrl-C while they run."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TextIO, TypeVar

from slm_jax.utils import progress

T = TypeVar("T")


class _Counter:
    """A line on a terminal that counts seconds, with the method `write` of a bar."""

    def __init__(self, text: str, stream: TextIO):
        self.fp = stream
        self._text = text
        self._start = time.monotonic()
        self._done = threading.Event()
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._draw("…")
        self._thread.start()

    def write(self, text: str, file: TextIO) -> None:
        """Print a line above the counter."""
        with self._lock:
            with contextlib.suppress(OSError):
                file.write(f"\r\x1b[K{text}\n")
            self._draw(f"… {time.monotonic() - self._start:.0f} s")

    def close(self) -> None:
        """Leave the duration, and begin a new line."""
        self._done.set()
        self._thread.join()
        self._draw(f"… {time.monotonic() - self._start:.1f} s", "\n")

    def _count(self) -> None:
        while not self._done.wait(1.0):
            self._draw(f"… {time.monotonic() - self._start:.0f} s")

    def _draw(self, state: str, end: str = "") -> None:
        """Replace the line; a longer one than the terminal would leave its first part behind."""
        with self._lock, contextlib.suppress(OSError):  # the terminal was closed; SIGHUP is about to arrive
            room = os.get_terminal_size(self.fp.fileno()).columns - len(state) - 1
            text = self._text[:room] if room > 0 else self._text  # a terminal of unknown width has 0 columns
            self.fp.write(f"\r\x1b[K{text}{state}{end}")
            self.fp.flush()


@contextlib.contextmanager
def waiting(text: str, stream: TextIO | None = None) -> Iterator[None]:
    """Show `text… 3 s` while the block runs: the seconds are counted on a terminal, elsewhere two lines are printed."""
    stream = stream or sys.stderr
    if stream.isatty() and progress.shown is None:
        progress.shown = counter = _Counter(text, stream)
        try:
            yield
        finally:
            progress.shown = None
            counter.close()
        return
    start = time.monotonic()
    _print(f"{text}…", stream)
    try:
        yield
    finally:
        _print(f"{text}: {time.monotonic() - start:.1f} s", stream)


def interruptible(function: Callable[[], T]) -> T:
    """Return the result of a function that runs in another thread, so that Ctrl-C is handled at once.

    Python handles signals in its main thread only, between two instructions: a compiler that runs there for minutes
    delays them. After Ctrl-C the thread is left behind; it ends with the process.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result()


def _print(line: str, stream: TextIO) -> None:
    """Print a line on a stream, above the bar or counter that is shown."""
    if progress.shown is not None:
        progress.write_line(line)
    else:
        print(line, file=stream, flush=True)
