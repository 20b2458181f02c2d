"""Messages between an engine and its clients: requests, chunks of tokens, and the state of the engine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from slm_jax.generation.sampling import Sampling
from slm_jax.utils.errors import UserError


class QueueFullError(Exception):
    """The queue of waiting requests is full."""


class EngineClosedError(UserError):
    """The engine accepts no requests any more."""


class TokenLogprob(NamedTuple):
    """The model's prediction of one token.

    Attributes:
        logprob: Log-probability of the token.
        top: The most probable ids with their log-probabilities, in descending order.
    """

    logprob: float
    top: list[tuple[int, float]]


class Chunk(NamedTuple):
    """New tokens of a request.

    Attributes:
        ids: The new ids.
        logprobs: One per id if the request has them computed, else empty.
        finish_reason: Empty except in the last chunk: "stop" (an id that ends a sequence, not part of `ids`),
            "length", "cancelled", "error", or the reason passed to `Request.finish`.
    """

    ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str = ""


@dataclass(eq=False)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt_ids: Ids of the prompt, at least one.
        max_tokens: Maximum number of tokens to generate.
        sampling: Sampling settings; `no_repeat_ngram` is not supported here.
        on_chunk: Called on the engine's thread with each chunk; the last one has a `finish_reason`.
        logprobs: Deliver a `TokenLogprob` with each generated id.
        prompt_logprobs: Deliver the ids of the prompt from the second on first, with a `TokenLogprob` each.
        ignore_eos: Never sample the id that ends a sequence.
        boundaries: Of a conversation: positions where messages begin, in ascending order; None: a text.
        finish_request: Reason to finish before the end, set by `finish`.
        submitted_at: `time.perf_counter()` at creation.
        generated: Number of generated tokens so far.
        reused: Number of tokens of the prompt that were not computed again (`prefix_cache`).
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    on_chunk: Callable[[Chunk], None]
    logprobs: bool = False
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    boundaries: Sequence[int] | None = None
    finish_request: str = ""
    submitted_at: float = field(default_factory=time.perf_counter)
    generated: int = 0
    reused: int = 0

    @property
    def length(self) -> int:
        """Number of tokens so far, prompt included."""
        return len(self.prompt_ids) + self.generated

    def finish(self, reason: str) -> None:
        """Ask the engine, from any thread, to finish the request in its next round; the first reason counts."""
        self.finish_request = self.finish_request or reason


class Occupancy(NamedTuple):
    """Number of requests that are decoded, and that wait."""

    running: int
    waiting: int


class Progress(NamedTuple):
    """Progress of the warm-up: number of its steps that are done, and of all; 0 of 0 without a warm-up."""

    done: int
    total: int
