"""Time of a call, with and without the compilation that it causes."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

_EVENTS = "/jax/core/compile/"  # tracing, lowering, and compiling or reading the cache of compiled programs


class CallTime(NamedTuple):
    """Seconds of a call.

    Attributes:
        total: All of them.
        compilation: Those that JAX spent on tracing and compiling.
    """

    total: float
    compilation: float

    @property
    def execution(self) -> float:
        """Seconds of the call without compilation."""
        return self.total - self.compilation


def call_time(function: Callable[[], object]) -> CallTime:
    """Call a function and measure its time."""
    spans = _spans()
    spans.clear()
    start = time.perf_counter()
    function()
    total = time.perf_counter() - start
    return CallTime(total, min(total, _covered(spans)))


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the seconds that spans (start, end) cover; a traced function inside another one counts once."""
    covered = 0.0
    last = 0.0
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return covered


@functools.cache
def _spans() -> list[tuple[float, float]]:
    """Return the list that the spans of compilations are appended to from now on."""
    spans: list[tuple[float, float]] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        del kwargs
        if event.startswith(_EVENTS):
            now = time.perf_counter()
            spans.append((now - duration_secs, now))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return spans
