"""The warm-up of an engine: requests that make every program be compiled, in a block of their own."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from slm_jax.generation.settings import Sampling
from slm_jax.serve.batching import MAX_STEPS
from slm_jax.serve.blocks import SlotBlock
from slm_jax.serve.prefill import CHUNKS, Prefill, PromptFeeder, text_chunks
from slm_jax.serve.prefix_cache import PromptChunk
from slm_jax.serve.requests import Progress, Request

logger = logging.getLogger(__name__)

_LOG_SECONDS = 2.0  # time between two log lines


class WarmUp:
    """Prompts that are still to be served, in a block that no client's request is in and that no statistics count."""

    def __init__(self, block: SlotBlock, columns: Sequence[int], chat: bool = True, chat_first: bool = False):
        """Choose the prompts.

        Args:
            block: An empty block.
            columns: Numbers of columns that a block can have.
            chat: Compile the programs of conversations as well.
            chat_first: Compile them before those of texts.
        """
        self._block: SlotBlock | None = block
        texts, conversations = _texts(columns), _conversations(columns) if chat else ()
        self._prompts = deque([*conversations, *texts] if chat_first else [*texts, *conversations])
        self._total = len(self._prompts)
        self._start = time.perf_counter()
        self._last_log = self._start

    @property
    def progress(self) -> Progress:
        """Number of prompts that were served, and of all."""
        return Progress(self._total - len(self._prompts), self._total)

    @property
    def is_running(self) -> bool:
        """True if there are prompts to serve."""
        return bool(self._prompts)

    def compile_next(self, feeder: PromptFeeder, weights: Any, name: str) -> None:
        """Serve one prompt.

        Args:
            feeder: Feeds the prompt.
            weights: The weights of the model.
            name: Name of the engine in log messages.
        """
        assert self._block is not None
        self._log(name)
        request, chunks = self._prompts[0]
        if request.boundaries is None:
            cache = feeder.empty_cache(weights, chunks[0].size)
        else:
            feeder.compile_copies(weights)
            cache = feeder.empty_cache(weights)
        prefill = Prefill(request, weights, cache, chunks)
        while not prefill.is_complete:
            feeder.feed(prefill)
        slot = self._block.insert(prefill)
        self._block.resize(0)
        self._block.decode(1)
        self._block.requests[slot] = None
        self._prompts.popleft()
        if not self._prompts:
            seconds = time.perf_counter() - self._start
            slots = len(self._block.requests)
            logger.info("%s: blocks of %d slots; compiled in %.1f s", name, slots, seconds)
            self._block = None

    def _log(self, name: str) -> None:
        """Log the progress, at most once in some seconds."""
        now = time.perf_counter()
        if now - self._last_log > _LOG_SECONDS:
            self._last_log = now
            done, total = self.progress
            logger.info("%s: compiling %d of %d (%.0f s)", name, done + 1, total, now - self._start)


def _texts(columns: Sequence[int]) -> Iterator[tuple[Request, list[PromptChunk]]]:
    """Yield texts that need every program: short ones first, those with log-probabilities of prompts last."""
    # One prompt per chunk size and per block size, then one that shrinks the block to the smallest size.
    chunks = {1, *(chunk + 1 for chunk in CHUNKS[:-1])}
    lengths = sorted(chunks | {max(count - MAX_STEPS, 1) for count in columns})
    for length, logprobs in [
        *((length, False) for length in [*lengths, 1]),
        *((length, True) for length in sorted(chunks)),
    ]:
        yield _request(length, logprobs), text_chunks(length)


def _conversations(columns: Sequence[int]) -> Iterator[tuple[Request, list[PromptChunk]]]:
    """Yield conversations that need every program: all block sizes, all chunk sizes (the rest is not computed)."""
    for count, size in zip_longest(columns, CHUNKS):
        length = max((count or columns[0]) - MAX_STEPS, 1)
        yield _request(length, boundaries=()), [PromptChunk(0, 1, size or CHUNKS[0])]
    yield _request(1, boundaries=()), [PromptChunk(0, 1, CHUNKS[0])]


def _request(length: int, logprobs: bool = False, boundaries: Sequence[int] | None = None) -> Request:
    return Request([0] * length, 1, Sampling(), lambda chunk: None, logprobs, logprobs, True, boundaries)
