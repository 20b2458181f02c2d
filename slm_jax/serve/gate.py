"""Bounds on work that runs in threads: how much runs and waits at the same time."""

from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from slm_jax.serve.errors import ApiError

T = TypeVar("T")


class Gate:
    """Runs functions in threads, few at a time; refuses them when too many wait.

    Python code holds the interpreter lock: each running function delays the event loop and the engines by up to the
    switch interval, so the number of running ones bounds the delay, whatever the number of clients.
    """

    def __init__(self, running: int, waiting: int):
        """Create a gate.

        Args:
            running: Maximum number of functions that run at the same time.
            waiting: Maximum number of calls that wait beyond these.
        """
        self._limiter = anyio.CapacityLimiter(running)
        self._maximum = running + waiting
        self._calls = 0

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in a thread and return its result.

        Raises:
            ApiError: Too many calls wait already (429).
        """
        if self._calls >= self._maximum:
            message = f"the server is busy: {self._calls} requests of this kind are running or waiting. Try again later"
            raise ApiError(429, message, code="busy", retry_after=1)
        self._calls += 1
        try:
            return await anyio.to_thread.run_sync(function, *args, limiter=self._limiter)
        finally:
            self._calls -= 1
