"""Prefetching: make batches, and copy them to the devices, ahead of the step that needs them."""

import threading
import time
from collections.abc import Callable
from queue import Empty, Queue
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from slm_jax.utils.batch import Arrays

_AHEAD = 2  # batches that are ready before they are needed
_STOP_INTERVAL = 0.05  # seconds


class TrainingBatches(Protocol):
    """The batches of a run as a function of the step: `PackedBatches` or `PaddedBatches`."""

    def at(self, step: int, shard: int = 0, num_shards: int = 1) -> Arrays:
        """Return the rows of a step's batch that one of several processes takes, int32 [B, T]."""

    def num_bytes(self, step: int) -> int:
        """Return the UTF-8 bytes of text that the labels of a step's batch stand for."""


class PrefetchedBatch(NamedTuple):
    """A batch on the devices.

    Attributes:
        batch: The result of `put`.
        num_bytes: UTF-8 bytes of text that the labels of the whole batch encode.
    """

    batch: Any
    num_bytes: int


class Prefetcher:
    """The batches of consecutive steps, made in a thread while earlier steps run; a context manager.

    Attributes:
        wait_seconds: Seconds that `next` has waited.
    """

    def __init__(
        self,
        batches: TrainingBatches,
        put: Callable[[Arrays], Any],
        first: int,
        last: int,
        shard: tuple[int, int] = (0, 1),
    ):
        """Prepare the thread, which starts with the context.

        Args:
            batches: The batches.
            put: Copies a batch, or this process's part of it, to the devices.
            first: The first step.
            last: The step after the last.
            shard: (index, number) of the parts of the rows that the processes take.
        """
        self.wait_seconds = 0.0
        self._batches = batches
        self._put = put
        self._steps = range(first, last)
        self._shard = shard
        self._ready: Queue[PrefetchedBatch | BaseException] = Queue(_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)

    def __enter__(self) -> "Prefetcher":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        while self._thread.is_alive():  # it may be waiting for space in the queue
            try:
                self._ready.get(timeout=_STOP_INTERVAL)
            except Empty:
                continue

    def _fill(self) -> None:
        try:
            for step in self._steps:
                if self._stop.is_set():
                    return
                batch = self._put(self._batches.at(step, *self._shard))
                self._ready.put(PrefetchedBatch(batch, self._batches.num_bytes(step)))
        except BaseException as error:
            self._ready.put(error)

    def next(self) -> PrefetchedBatch:
        """Return the batch of the next step; waits until it is ready.

        Raises:
            BaseException: The exception that making the batch raised.
        """
        start = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item
