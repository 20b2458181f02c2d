"""Time of a call, with and without the compilation that it causes."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

_EVENTS = "/jax/core/compile/"  # tracing, lowering, and compiling or reading the cache of compiled programs


class CallTime(NamedTuple):
    """Wall-clock time of a call in seconds.

    Attributes:
        total: All of the call.
        compilation: Time spent tracing and compiling.
    """

    total: float
    compilation: float

    @property
    def execution(self) -> float:
        """Seconds of the call without compilation."""
        return self.total - self.compilation


def call_time(function: Callable[[], object]) -> CallTime:
    """Call a function and measure its time."""
    listener = _listener()
    spans: list[tuple[float, float]] = []
    listener.spans = spans
    start = time.perf_counter()
    try:
        function()
    finally:
        listener.spans = None
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


class _Listener:
    """Collects the spans of compilations in `spans`, which is None while no call is measured."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] | None = None

    def __call__(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        del kwargs
        spans = self.spans
        if spans is not None and event.startswith(_EVENTS):
            now = time.perf_counter()
            spans.append((now - duration_secs, now))


@functools.cache
def _listener() -> _Listener:
    """Return the listener of the process, registered with JAX at the first call."""
    listener = _Listener()
    jax.monitoring.register_event_duration_secs_listener(listener)
    return listener
