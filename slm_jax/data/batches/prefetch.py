"""Batches for a run: made by its config, and made ready ahead of the step that wants them."""

import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, Queue
from types import TracebackType
from typing import Any, NamedTuple

from slm_jax.config.schema import Config
from slm_jax.data.batches.packed import Arrays, PackedBatches, sequential_batches
from slm_jax.data.batches.padded import PaddedBatches, sequential_padded_batches
from slm_jax.data.corpus.corpus import Corpus, TokenStream

_AHEAD = 2  # batches that are ready before they are wanted


def make_batches(config: Config, corpus: Corpus) -> PackedBatches | PaddedBatches:
    """The training batches of a config, `data.mode`. Raises UserError if there is too little text for one."""
    train = config.train
    if config.data.mode == "padded":
        return PaddedBatches(corpus.parts, train.batch_size, train.sequence_length, train.seed)
    segments = config.data.mode == "segmented"
    return PackedBatches(corpus.parts, train.batch_size, train.sequence_length, train.seed, segments)


def validation_batches(config: Config, split: TokenStream, rows: int) -> Iterator[tuple[Arrays, int]]:
    """(batch of so many rows, bytes of text that its targets stand for): all of a split once, in order."""
    length = config.train.sequence_length
    if config.data.mode == "padded":
        yield from sequential_padded_batches(split, rows, length)
        return
    for i, batch in enumerate(sequential_batches(split, rows, length, config.data.mode == "segmented")):
        yield batch, split.num_bytes_between(i * rows * length, min((i + 1) * rows * length, len(split)))


class PrefetchedBatch(NamedTuple):
    """A batch on the devices, and the bytes of text that its targets stand for."""

    batch: Any
    num_bytes: int


class Prefetcher:
    """The batches of steps first..last-1 in order, each made by a thread while the steps before it run."""

    def __init__(
        self,
        batches: PackedBatches | PaddedBatches,
        put: Callable[[Arrays], Any],
        first: int,
        last: int,
        part: tuple[int, int] = (0, 1),
    ):
        """put: takes a batch, or this process's part (host, hosts) of it, to the devices."""
        self._batches, self._put, self._steps, self._part = batches, put, range(first, last), part
        self._ready: Queue[PrefetchedBatch | BaseException] = Queue(_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)
        self.wait_seconds = 0.0  # seconds that `next` had to wait

    def __enter__(self) -> "Prefetcher":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        while self._thread.is_alive():  # it may be waiting for room
            try:
                self._ready.get(timeout=0.05)
            except Empty:
                continue

    def _fill(self) -> None:
        try:
            for step in self._steps:
                if self._stop.is_set():
                    return
                self._ready.put(
                    PrefetchedBatch(self._put(self._batches.at(step, *self._part)), self._batches.num_bytes(step))
                )
        except BaseException as error:
            self._ready.put(error)

    def next(self) -> PrefetchedBatch:
        """The next step's batch. Raises what making it has raised."""
        begin = time.perf_counter()
        found = self._ready.get()
        self.wait_seconds += time.perf_counter() - begin
        if isinstance(found, BaseException):
            raise found
        return found
