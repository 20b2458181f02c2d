"""Prompts on their way into a slot: the chunks that they are fed in, and the parts that need not be fed again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from slm_jax.model.kv_cache import KVCache
from slm_jax.serve import batching
from slm_jax.serve.batching import Logprobs
from slm_jax.serve.prefix_cache import PrefixCache, PromptChunk
from slm_jax.serve.requests import Chunk, Request, TokenLogprob

CHUNKS = (16, 64, 256)
"""Sizes of a chunk, each a program."""
_MIN_COLUMNS = 64  # of a kept prompt; doubled up to the columns of a conversation's cache


def text_chunks(length: int) -> list[PromptChunk]:
    """Return the chunks of a text: of the smallest size that holds all of it, or of the largest size."""
    size = next((size for size in CHUNKS if length <= size), CHUNKS[-1])
    return [PromptChunk(first, min(size, length - first), size) for first in range(0, length, size)]


def conversation_chunks(length: int, boundaries: Sequence[int]) -> list[PromptChunk]:
    """Return the chunks of a conversation: those of a message do not depend on the messages after it.

    The sizes for a message are those that compute it fastest: a chunk of 16, 64 and 256 tokens takes 1, 2.2 to 3 and
    8 to 9 units of time on a CPU.

    Args:
        length: Number of tokens.
        boundaries: Positions where a chunk has to begin, in ascending order.
    """
    small, medium, large = CHUNKS
    chunks = []
    for first, end in zip([0, *boundaries], [*boundaries, length], strict=True):
        while first < end:
            rest = end - first
            size = large if rest > 3 * medium else medium if rest > 2 * small else small
            chunks.append(PromptChunk(first, min(size, rest), size))
            first += chunks[-1].length
    return chunks


@dataclass
class Prefill:
    """A prompt on its way into a slot.

    Attributes:
        request: The request.
        weights: The weights that compute it.
        cache: Keys and values of the chunks that were fed.
        chunks: All chunks.
        fed: Number of those that were fed, or reused.
        logits_V: float32, the logits after the last chunk that was fed.
    """

    request: Request
    weights: Any
    cache: KVCache
    chunks: Sequence[PromptChunk]
    fed: int = 0
    logits_V: Any = None

    @property
    def is_complete(self) -> bool:
        """True if all chunks were fed."""
        return self.fed == len(self.chunks)


class PromptFeeder:
    """Feeds prompts chunk by chunk. Call it on the engine's thread.

    Attributes:
        prefixes: Keys and values of earlier conversations.
    """

    def __init__(self, graph: nnx.GraphDef, window: int, context: int, prefixes: PrefixCache):
        """Prepare to feed prompts.

        Args:
            graph: Graph of the model.
            window: Number of tokens that attention sees.
            context: Maximum number of tokens of a conversation.
            prefixes: Cache for the keys and values of conversations.
        """
        self.prefixes = prefixes
        self._graph = graph
        self._window = window
        self._column_bytes: int | None = None  # of a conversation's cache
        # A chunk may begin in any column before the context's end, and its padding exceeds that.
        self._columns = -(-(context + CHUNKS[-1] - 1) // CHUNKS[-1]) * CHUNKS[-1]

    def start(self, request: Request, weights: Any) -> Prefill:
        """Return a prompt of which nothing was fed except what earlier conversations have in common with it."""
        length = len(request.prompt_ids)
        if request.boundaries is None:
            chunks = text_chunks(length)
            return Prefill(request, weights, self.empty_cache(weights, chunks[0].size), chunks)
        chunks = conversation_chunks(length, request.boundaries)
        # The last chunk is fed in any case: its logits are needed, which are not kept.
        reusable = [] if request.prompt_logprobs else chunks[:-1]
        kept, count = self.prefixes.find(weights, _ids(request), reusable)
        if kept is not None:
            with self.prefixes.optional("restoring a conversation"):
                length = chunks[count - 1].end
                cache = batching.restore_prompt(kept, np.int32(length), self._columns)
                jax.block_until_ready(cache)  # an error of the device appears here, not in the chunks that follow
                self.prefixes.note_reuse()
                request.reused = length
                return Prefill(request, weights, cache, chunks, count)
        return Prefill(request, weights, self.empty_cache(weights), chunks)

    def empty_cache(self, weights: Any, size: int = 0) -> KVCache:
        """Return an empty cache for a text that is fed in chunks of a size, or, if that is 0, for a conversation."""
        columns = -(-(self._window + size - 1) // size) * size if size else self._columns
        return batching.empty_prompt_cache(self._graph, weights, columns)

    def feed(self, prefill: Prefill) -> int:
        """Feed the next chunk of a prompt, and deliver its log-probabilities if they were asked for.

        Returns:
            The number of tokens computed, padding included.
        """
        request = prefill.request
        chunk = prefill.chunks[prefill.fed]
        ids = np.asarray(request.prompt_ids[chunk.first : chunk.end], np.int32)
        next_ids = np.asarray(request.prompt_ids[chunk.first + 1 : chunk.end + 1], np.int32)
        prefill.fed += 1
        prefill.cache, prefill.logits_V, logprobs = batching.prefill_chunk(
            self._graph,
            prefill.weights,
            prefill.cache,
            _pad(ids, chunk.size),
            np.int32(chunk.first),
            np.int32(chunk.length),
            _pad(next_ids, chunk.size),
            self._window,
            request.prompt_logprobs,
        )
        if logprobs is not None and len(next_ids):
            request.on_chunk(Chunk(next_ids.tolist(), token_logprobs(logprobs, len(next_ids))))
        return chunk.size

    def keep(self, prefill: Prefill) -> None:
        """Keep the keys and values of a conversation that was fed, if the prefix cache has room for it."""
        ids = _ids(prefill.request)
        if not self.fits(prefill.weights, len(ids)) or self.prefixes.has(prefill.weights, ids, prefill.chunks):
            return
        with self.prefixes.optional("keeping a conversation"):
            kept = jax.block_until_ready(batching.trim_prompt(prefill.cache, self._kept_columns(len(ids))))
            self.prefixes.add(prefill.weights, ids, prefill.chunks, kept)

    def fits(self, weights: Any, length: int) -> bool:
        """Return whether the prefix cache can hold a conversation of a length, alone."""
        if not self.prefixes.max_bytes:
            return False
        if self._column_bytes is None:
            shapes = batching.empty_prompt_cache.eval_shape(self._graph, weights, self._columns)
            self._column_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) // self._columns
        return self._column_bytes * self._kept_columns(length) <= self.prefixes.max_bytes

    def _kept_columns(self, length: int) -> int:
        return next(columns for columns in kept_columns(self._columns) if columns >= length)

    def compile_copies(self, weights: Any) -> None:
        """Compile the programs that keep a conversation and restore it, of the sizes that the prefix cache can hold."""
        with self.prefixes.optional("compiling the programs of the prefix cache"):
            cache = self.empty_cache(weights)
            for columns in kept_columns(self._columns):
                if self.fits(weights, columns):
                    batching.restore_prompt(batching.trim_prompt(cache, columns), np.int32(0), self._columns)


def kept_columns(full: int) -> list[int]:
    """Return the numbers of columns that a conversation is kept with, so that few programs are compiled."""
    return [*(_MIN_COLUMNS << i for i in range(32) if _MIN_COLUMNS << i < full), full]


def token_logprobs(logprobs: Logprobs, count: int) -> list[TokenLogprob]:
    """Return the first `count` log-probabilities of one sequence."""
    token, top_ids, top = (np.asarray(x)[:count].tolist() for x in jax.device_get(logprobs))
    return [
        TokenLogprob(value, list(zip(ids, values, strict=True)))
        for value, ids, values in zip(token, top_ids, top, strict=True)
    ]


def _ids(request: Request) -> np.ndarray:
    return np.asarray(request.prompt_ids, np.int32)


def _pad(ids: np.ndarray, length: int) -> np.ndarray:
    return np.pad(ids, (0, length - len(ids)))
