"""Bounds on connections: silent clients and half-sent requests can neither exhaust descriptors nor stop the server."""

import asyncio
import logging
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger(__name__)

HEADER_SECONDS = 10.0
"""Time from the first byte of a request, or from the connection, to the end of its headers."""
MAX_HEADER_BYTES = 65_536
"""Size of the headers of a request beyond which its connection is closed (httptools has no limit)."""
WRITE_SECONDS = 60.0
"""Time after which a client that reads nothing of its response is disconnected."""
_MAX_CONNECTIONS = 1024
_MAX_DESCRIPTORS = 65_536
_RESERVE = 8  # descriptors for files that are opened while serving


class ConnectionLimits(NamedTuple):
    """Bounds that keep the number of descriptors below the limit of the process.

    Attributes:
        connections: Maximum number of open connections.
        backlog: Number of connections that asyncio accepts at once, before any of them can be refused.
    """

    connections: int
    backlog: int


def connection_limits() -> ConnectionLimits:
    """Raise the soft descriptor limit to the hard one and return the bounds that it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    folder = Path("/proc/self/fd")
    used = len(list((folder if folder.is_dir() else Path("/dev/fd")).iterdir()))
    free = _MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else max(soft - used - _RESERVE, 3)
    # Refused connections are closed one iteration of the event loop later: two batches may be open at once.
    backlog = max(min(free // 5, 128), 1)
    return ConnectionLimits(max(min(free - 2 * (backlog + 1), _MAX_CONNECTIONS), 1), backlog)


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle errors of the event loop: one line for a lack of descriptors, which asyncio logs thousands of times."""
    if "out of system resource" not in context.get("message", ""):
        loop.default_exception_handler(context)
    elif not getattr(loop, "_slm_jax_warned", False):
        loop._slm_jax_warned = True  # type: ignore[attr-defined]
        logger.warning("warning: no descriptor is free for a new connection; raise the limit (ulimit -n)")


class LogLimit(logging.Filter):
    """Pass a limited number of log records per minute, so that repeated errors cannot fill a disk; count the rest."""

    def __init__(self, records: int = 20, seconds: float = 60.0):
        super().__init__()
        self._records = records
        self._seconds = seconds
        self._start = -seconds
        self._count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a record; the first one of a period says how many were left out before."""
        now = time.monotonic()
        if now - self._start >= self._seconds:
            if self._count > self._records:
                logger.warning("warning: %d more errors were not logged", self._count - self._records)
            self._start = now
            self._count = 0
        self._count += 1
        return self._count <= self._records


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with time limits and a maximum number of connections.

    At the maximum, a new connection replaces the oldest one without a complete request, so that clients that only hold
    connections, or send half a request, do not keep others out; it is refused if there is none.
    """

    max_connections = _MAX_CONNECTIONS
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _opened = 0.0
    _header_bytes = 0  # received since the last complete headers, while no request is in progress
    _partial = False  # the headers of a request have begun and are incomplete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register the connection, or refuse it."""
        super().connection_made(transport)
        self._opened = self.loop.time()
        self._await_headers()
        if len(self.connections) <= self.max_connections:
            return
        connections: Any = self.connections
        others = [each for each in connections if each is not self and not each._is_complete()]
        oldest: Any = min(others, key=lambda each: each._opened, default=self)
        self.connections.discard(oldest)
        oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Receive a part of a request."""
        super().data_received(data)
        if not self._in_progress():
            self._await_headers()
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self.transport.abort()

    def on_headers_complete(self) -> None:
        """Start a request."""
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        self._partial = False
        self._header_bytes = 0
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """Start the time limit of a client that does not read."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """End it."""
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().resume_writing()

    def shutdown(self) -> None:
        """Close the connection when its request is answered; at once if the request is incomplete."""
        if self._in_progress() and not self._is_complete():
            self.transport.close()
        else:
            super().shutdown()

    def on_response_complete(self) -> None:
        """Wait for the next request; the time limit of its headers counts from its first byte (`data_received`)."""
        super().on_response_complete()
        if self._partial and not self._in_progress():
            self._await_headers()

    def on_message_begin(self) -> None:
        """Note that a request has begun."""
        self._partial = True
        super().on_message_begin()

    def _in_progress(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _is_complete(self) -> bool:
        """Return whether a request has been received as a whole and is being answered."""
        return self._in_progress() and not self.cycle.more_body

    def _await_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
