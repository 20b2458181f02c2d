"""A block of slots on the host: which request is in which slot, and the calls of the compiled programs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from slm_jax.generation.batch import id_mask
from slm_jax.generation.sampling import Sampling, stack_sampling
from slm_jax.serve import batching
from slm_jax.serve.batching import MAX_STEPS, Logprobs, SlotInputs, TokenMasks
from slm_jax.serve.prefill import Prefill
from slm_jax.serve.requests import Request

_MIN_COLUMNS = 64  # of an empty block; doubled as its sequences grow
_NO_REQUEST = Request((), 0, Sampling(temperature=0), lambda chunk: None)  # stands for an empty slot


def block_columns(window: int) -> list[int]:
    """Return the numbers of columns that a block can have, in ascending order; the last one holds the window."""
    full = -(-window // _MIN_COLUMNS) * _MIN_COLUMNS
    return [*(c for c in (_MIN_COLUMNS << i for i in range(32)) if c < full), full]


class SlotBlock:
    """Slots that one compiled program decodes.

    Attributes:
        requests: The request in each slot, None for an empty one.
        weights: The weights that its requests began with.
        step_seconds: Time of a decoding step at the last call.
    """

    def __init__(self, graph: nnx.GraphDef, weights: Any, slots: int, window: int, masks: TokenMasks):
        """Allocate a block of empty slots.

        Args:
            graph: Graph of the model.
            weights: Its weights.
            slots: Number of slots.
            window: Number of tokens that attention sees.
            masks: Masks over the vocabulary.
        """
        self._graph = graph
        self._window = window
        self._masks = masks
        self._columns = block_columns(window)
        self._state = batching.empty_block(graph, weights, slots, self._columns[0])
        self.requests: list[Request | None] = [None] * slots
        self.weights = weights
        self.step_seconds = 0.0

    @property
    def columns(self) -> int:
        """Number of tokens that each slot's cache holds."""
        return self._state.cache.positions.shape[1]

    def running(self) -> list[tuple[int, Request]]:
        """Return the slots with a request, and these."""
        return [(slot, request) for slot, request in enumerate(self.requests) if request is not None]

    def insert(self, prefill: Prefill) -> int:
        """Put a complete prompt into a free slot; returns the slot."""
        ids = prefill.request.prompt_ids
        slot = self.requests.index(None)
        self.resize(len(ids))
        seen_V = id_mask(ids, self._masks.stops_2xV.shape[1])
        length = np.int32(len(ids))
        self._state = batching.insert(self._state, np.int32(slot), prefill.cache, length, prefill.logits_V, seen_V)
        self.requests[slot] = prefill.request
        self.weights = prefill.weights
        return slot

    def resize(self, length: int) -> None:
        """Provide the columns that its sequences, and one of `length` tokens, need; fewer if half would do."""
        needed = max([length, *(request.length + MAX_STEPS for _, request in self.running())])
        wanted = sum(columns < needed for columns in self._columns[:-1])  # index of the smallest sufficient size
        index = self._columns.index(self.columns)
        # A sequence whose buffer has wrapped keeps its columns; so does one that would soon need them again.
        if wanted < index and 2 * needed > self.columns:
            return
        while index != wanted:  # by single steps, so that few programs are compiled
            index += 1 if index < wanted else -1
            self._state = batching.resize(self._state, self._columns[index])

    def decode(self, steps: int) -> tuple[np.ndarray, Logprobs]:
        """Generate up to `steps` tokens in every slot.

        Returns:
            The ids int32 [B, N] on the host, and log-probabilities [B, N] on the device.
        """
        inputs = slot_inputs([request or _NO_REQUEST for request in self.requests])
        self._state, ids_BxN, logprobs = batching.decode(
            self._graph, self.weights, self._state, inputs, self._masks, np.int32(steps), self._window
        )
        return np.asarray(ids_BxN), logprobs


def slot_inputs(requests: Sequence[Request]) -> SlotInputs:
    """Return counts and settings of the request in each slot."""
    return SlotInputs(
        position_B=np.array([request.length for request in requests], np.int32),
        generated_B=np.array([request.generated for request in requests], np.int32),
        remaining_B=np.array([request.max_tokens - request.generated for request in requests], np.int32),
        seed_B=np.array([request.sampling.seed for request in requests], np.uint32),
        ignore_eos_B=np.array([request.ignore_eos for request in requests], bool),
        logprobs_B=np.array([request.logprobs for request in requests], bool),
        chat_B=np.array([request.boundaries is not None for request in requests], bool),
        sampling=stack_sampling([request.sampling for request in requests]),
    )
