"""Silence what Orbax prints by itself; errors that matter are raised."""

import asyncio
import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silence the log of each phase of a save, and the tracebacks that follow a failed one."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with _forgiving_event_loops():
            yield
    finally:
        log.setLevel(level)


class _ForgivingLoop(asyncio.SelectorEventLoop):
    """An event loop that ignores what is reported to it after it was closed.

    When the first of many writes fails, Orbax closes its loop. Each other write then fails to report to it, in a thread
    of TensorStore, which prints a traceback.
    """

    def call_soon_threadsafe(  # type: ignore[override]  # the declared type is generic in the arguments
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """Schedule a callback from another thread."""
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise
            return asyncio.Handle(callback, args, self, context)  # never runs


class _ForgivingPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _ForgivingLoop()


@contextlib.contextmanager
def _forgiving_event_loops() -> Iterator[None]:
    """Let loops that are created in the block, in any thread, be forgiving ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of policies, from Python 3.14 on
        before = asyncio.get_event_loop_policy()
        asyncio.set_event_loop_policy(_ForgivingPolicy())
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            asyncio.set_event_loop_policy(before)
