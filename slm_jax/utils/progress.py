"""Progress and log output on stderr: one bar or counter at a time, all other lines above it.

The library logs through `logging.getLogger(__name__)`. Commands, and public functions that take long, call
`show_log` first; it changes nothing where the program has set up logging of its own.
"""

import contextlib
import logging
import sys
from typing import Any, TextIO

from tqdm import tqdm

_root = logging.getLogger("slm_jax")
shown: Any = None  # the tqdm bar or counter (waiting.py) on the last line of the terminal, if there is one


def write_line(text: str) -> None:
    """Print a line on stderr, above the bar or counter that is shown there."""
    if shown is not None:
        shown.write(text, file=shown.fp)
    else:
        print(text, file=sys.stderr, flush=True)


class _StderrHandler(logging.Handler):
    """Write the bare message to the current `sys.stderr`, above a progress bar."""

    prefix = ""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_line(self.prefix + self.format(record))
        except Exception:
            self.handleError(record)


def show_log(prefix: str = "") -> None:
    """Print the library's log messages of level INFO and above to stderr, unless the program handles them itself.

    Does nothing if the logger `slm_jax` or the root logger has been set up already. The import of Orbax does not count:
    it calls `logging.basicConfig` without arguments (through absl), which shows warnings only.

    Args:
        prefix: Text before each message, of a process of a run other than the first one; such a process prints level
            WARNING and above only.
    """
    if prefix:
        _root.setLevel(logging.WARNING)
        for handler in _root.handlers:
            if isinstance(handler, _StderrHandler):
                handler.prefix = prefix
    handlers = logging.getLogger().handlers
    is_set_up = handlers and (_root.isEnabledFor(logging.INFO) or not all(map(_is_default, handlers)))
    if _root.handlers or is_set_up:
        return
    handler = _StderrHandler()
    handler.prefix = prefix
    _root.addHandler(handler)
    _root.propagate = False  # else the default handler prints each message again
    if _root.level == logging.NOTSET:
        _root.setLevel(logging.INFO)


def _is_default(handler: logging.Handler) -> bool:
    """Return whether a handler is as `logging.basicConfig()` creates it."""
    form = handler.formatter
    return type(handler) is logging.StreamHandler and form is not None and form._fmt == logging.BASIC_FORMAT


class ProgressBar:
    """A bar on a terminal; elsewhere plain lines, at most one in every `every` units."""

    def __init__(self, total: int, done: int, every: int, stream: TextIO | None = None):
        """Start the bar.

        Args:
            total: Units of work, those done before included.
            done: Units done before this process.
            every: Units between two lines where there is no terminal.
            stream: Where to write; None: `sys.stderr`.
        """
        self._stream = stream or sys.stderr
        self._every = every
        self._total = total
        self._bar = None
        if self._stream.isatty():
            global shown
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=total, initial=done, bar_format=form, file=self._stream, dynamic_ncols=True)
            shown = self._bar

    def show(self, done: int, text: str) -> None:
        """Show that `done` units are done, with a text about the newest one."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal was closed; SIGHUP is about to arrive
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(done - self._bar.n)
        elif done % self._every == 0 or done == self._total:
            print(f"step {done}/{self._total}  {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        global shown
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
            shown = None
