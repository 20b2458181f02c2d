"""Continuous-batching engine: one thread admits requests, decodes all of them together and delivers tokens.

A `Request` waits until a slot is free. Its prompt is then fed in chunks, between the decoding steps of the others, so
that a long prompt does not stall them. It joins a block of slots and leaves it at its end, at a stop, or when it is
canceled. What is computed for it does not depend on the other requests (batching.py).

The method is iteration-level scheduling (Orca, Yu et al., OSDI 2022) with chunked prefill (Sarathi, arXiv:2308.16369).
"""

import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from slm_jax.generation.batch import id_mask
from slm_jax.generation.decode import prepare_weights, suppressed_ids
from slm_jax.generation.sampling import Sampling
from slm_jax.run.conversations import is_chat_trained
from slm_jax.run.load import LoadedRun
from slm_jax.serve.batching import MAX_STEPS, Logprobs, TokenMasks
from slm_jax.serve.blocks import SlotBlock, block_columns
from slm_jax.serve.conversation import chat_masks, find_template
from slm_jax.serve.metrics import Counters
from slm_jax.serve.prefill import Prefill, PromptFeeder, token_logprobs
from slm_jax.serve.prefix_cache import PrefixCache
from slm_jax.serve.requests import Chunk, EngineClosedError, Occupancy, Progress, QueueFullError, Request
from slm_jax.serve.warm_up import WarmUp
from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

_PREFILL_BUDGET = 512  # maximum number of prompt tokens fed between two decoding calls
_ROUND_SECONDS = 0.1  # approximate time of a round over all blocks, and so between two chunks of a request


class Engine:
    """Continuous batching of one run's model.

    Attributes:
        run: The run that is served.
        name: Name in log messages.
        slots: Number of requests decoded at the same time.
        block_slots: Number of slots that one compiled program decodes.
        queue_size: Number of requests that may wait beyond the slots.
        window: Number of tokens that attention sees: `context`, or less if every layer has a window.
        context: Maximum number of tokens of a conversation, answer included.
        prefixes: Keys and values of earlier conversations.
        stop_ids: Ids that end a text.
        chat_template: The chat template of the tokenizer, None without one.
        no_chat_reason: The reason why there is none.
        counters: Statistics since the start.
        failure: The exception that ended the engine's thread, if any.
    """

    def __init__(
        self,
        run: LoadedRun,
        slots: int = 32,
        queue_size: int = 64,
        block_slots: int = 0,
        context: int = 0,
        name: str = "",
        prefix_cache: int = 512,
    ):
        """Allocate the blocks; nothing is compiled for requests yet, see `start`.

        Args:
            run: The run to serve.
            slots: Number of requests decoded at the same time, rounded up to whole blocks.
            queue_size: Number of requests that may wait beyond these.
            block_slots: Slots per compiled program; 0: eight on a CPU (whose caches hold what eight slots need), all
                slots on other devices.
            context: Maximum number of tokens of a conversation, and of those that attention sees: layers without a
                window of their own see all of them. 0: the length that the model was trained at.
            name: Name in log messages; empty: that of the run directory.
            prefix_cache: Maximum size of the keys and values of earlier conversations that are kept, in MB.
        """
        self.run = run
        self.name = name or run.run.path.name
        self._options = (slots, queue_size, block_slots, context)
        self._prefix_cache = prefix_cache
        self.queue_size = queue_size
        model = run.model
        self.block_slots = min(block_slots or (8 if model.platform.name == "cpu" else slots), slots)
        self.slots = -(-slots // self.block_slots) * self.block_slots
        self.context = context or run.context
        self.window = min(w for w in (self.context, model.config.longest_window) if w)
        self._log_long_context()
        self.stop_ids = tuple(run.tokenizer.stop_ids)
        self.counters = Counters()
        self.failure: BaseException | None = None
        self._graph, params = nnx.split(model, nnx.Param)
        self._weights = prepare_weights(self._graph, params)
        self.chat_template, self.no_chat_reason = find_template(run.tokenizer)
        self._masks = self._token_masks()
        self._blocks = [self._empty_block() for _ in range(self.slots // self.block_slots)]
        self.prefixes = PrefixCache(self.max_prefix_bytes)
        self.prefixes.reset(self._weights)
        self._feeder = PromptFeeder(self._graph, self.window, self.context, self.prefixes)
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._queue: deque[Request] = deque()
        self._prefills: deque[Prefill] = deque()
        self._unsaved: list[Prefill] = []  # conversations that were fed, and whose keys and values are still to be kept
        self._answered: deque[Request] = deque(maxlen=self.slots)  # to be computed while there is nothing else to do
        self._ahead: Prefill | None = None  # the one of these that is being computed
        self._lock = threading.Lock()
        self._unfinished = 0  # requests submitted and not finished
        self._closing = False
        self._warm_up: WarmUp | None = None
        self._thread = threading.Thread(target=self._serve, name=f"engine {self.name}", daemon=True)

    def _log_long_context(self) -> None:
        if self.context > self.run.context:
            logger.info(
                "note: %s was trained on %d tokens at once; the context of %d lets it attend to longer distances, "
                "which it has not seen in training",
                self.name,
                self.run.context,
                self.context,
            )

    def _token_masks(self) -> TokenMasks:
        tokenizer, size = self.run.tokenizer, self.run.model.vocab_size
        suppressed, stops = suppressed_ids(tokenizer), list(self.stop_ids)
        chat = chat_masks(tokenizer, self.chat_template) if self.chat_template else (suppressed, stops)
        self._chat_stop_ids = frozenset(chat[1])
        rows = [[id_mask(ids, size) for ids in pair] for pair in zip((suppressed, stops), chat, strict=True)]
        return TokenMasks(np.stack(rows[0]), np.stack(rows[1]))

    # Called from any thread.

    def start(self, warm_up: bool = False) -> None:
        """Start the engine's thread.

        Args:
            warm_up: Compile every program that requests will need: those of short prompts first, and those of texts
                before those of conversations unless the run was trained on conversations. Requests may be submitted
                meanwhile: they are served between two programs.
        """
        if warm_up:
            chat_first = self.chat_template is not None and is_chat_trained(self.run.run)
            columns = block_columns(self.window)
            self._warm_up = WarmUp(self._empty_block(), columns, self.chat_template is not None, chat_first)
        self._thread.start()

    def for_run(self, run: LoadedRun, name: str) -> "Engine":
        """Return an engine of another run, with the options of this one."""
        return Engine(run, *self._options, name, self._prefix_cache)

    @property
    def max_prefix_bytes(self) -> int:
        """Maximum size of the prefix cache by the options; errors may have reduced or paused that of `prefixes`."""
        return self._prefix_cache * 10**6

    @functools.cached_property
    def longest_token(self) -> int:
        """The most characters of a text that one id stands for: at most the bytes of the longest token.

        A special token, which has no bytes, counts with its name, which published tokenizers recognize in a text.
        """
        tokenizer = self.run.tokenizer
        return max(len(data or tokenizer.id2token.get(id_, "")) for id_, data in enumerate(tokenizer.token_bytes))

    @property
    def progress(self) -> Progress:
        """Progress of the warm-up."""
        return self._warm_up.progress if self._warm_up else Progress(0, 0)

    def submit(self, requests: Sequence[Request]) -> None:
        """Accept all of the requests or none.

        Args:
            requests: The requests; their chunks arrive through `on_chunk`.

        Raises:
            QueueFullError: Slots and queue have no room for all of them.
            EngineClosedError: The engine has stopped.
            UserError: Ids or sampling settings are invalid.
        """
        size = self.run.model.vocab_size
        for request in requests:
            length = len(request.prompt_ids)
            if request.boundaries is not None and length > self.context:
                raise UserError(f"a conversation of {length:,} tokens exceeds the context of {self.context:,}")
            if not request.prompt_ids or not all(0 <= id_ < size for id_ in request.prompt_ids):
                raise UserError(f"a prompt must have at least one id, each from 0 to {size - 1}")
            request.sampling.check()
        with self._lock:
            if self._closing or self.failure:
                raise EngineClosedError("the engine has stopped")
            if self._unfinished + len(requests) > self.slots + self.queue_size:
                raise QueueFullError
            self._unfinished += len(requests)
        for request in requests:
            self._inbox.put(request)

    def replace_weights(self, run: LoadedRun) -> None:
        """Use another checkpoint of the run for the requests that begin from now on; the others end with theirs.

        Nothing is compiled: the shapes are the same. May be called from any thread.

        Args:
            run: The run, loaded again.

        Raises:
            UserError: Its weights have other shapes.
        """
        params = nnx.state(run.model, nnx.Param)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
        if shapes != jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(self.run.model, nnx.Param)):
            raise UserError(f"{run.run.path} has weights of other shapes than those that are served: start again")
        self._weights = prepare_weights(self._graph, params)
        self.prefixes.reset(self._weights)
        self.run = run

    def compute_ahead(self, prompt_ids: Sequence[int], boundaries: Sequence[int]) -> None:
        """Compute the keys and values of a conversation while there is nothing else to do: its next turn reuses them.

        May be called from any thread. If much else is to do, the oldest of these conversations are left out.

        Args:
            prompt_ids: Ids of the conversation, the last answer included.
            boundaries: Positions where messages begin, see `Request`.
        """
        if len(prompt_ids) <= self.context and self._feeder.fits(self._weights, len(prompt_ids)):
            self._answered.append(Request(prompt_ids, 0, Sampling(), lambda chunk: None, boundaries=boundaries))
            self._inbox.put(None)

    def occupancy(self) -> Occupancy:
        """Return the number of running and of waiting requests."""
        running = sum(len(block.running()) for block in self._blocks)
        return Occupancy(running, max(self._unfinished - running, 0))

    def close(self) -> None:
        """Finish all requests as canceled and stop the thread."""
        with self._lock:
            self._closing = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    # Called on the engine's thread.

    def _serve(self) -> None:
        """Run until the engine is closed or fails, then finish every request."""
        try:
            while self._round():
                pass
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._lock:
                self._closing = True
            self._drain_inbox()
            last = Chunk([], [], "error" if self.failure else "cancelled")
            for block in self._blocks:
                for slot, request in block.running():
                    self._release(block, slot, request, last)
            for request in [*(prefill.request for prefill in self._prefills), *self._queue]:
                self._finish(request, last)
            self._prefills.clear()
            self._queue.clear()

    def _round(self) -> bool:
        """Admit requests, feed prompts and decode, block by block; new requests are noticed between two blocks.

        Returns:
            False once the engine is being closed.
        """
        for prefill in self._unsaved:  # not when it was fed, for a low latency of its first token
            self._feeder.keep(prefill)
        self._unsaved.clear()
        if self._warm_up and self._warm_up.is_running:
            self._warm_up.compile_next(self._feeder, self._weights, self.name)
        for number, block in enumerate(self._blocks):
            if not self._drain_inbox(wait=number == 0):
                return False
            self._feed_prompts()
            if block.running():
                self._decode(block, sum(bool(each.running()) for each in self._blocks))
        self._compute_ahead()
        return True

    def _drain_inbox(self, wait: bool = False) -> bool:
        """Move submitted requests to the queue and drop canceled ones; with `wait`, block while the engine is idle.

        Returns:
            False once the engine is being closed.
        """
        busy = self._queue or self._prefills or self._unsaved or self._answered or self._ahead
        idle = wait and not busy and not any(block.running() for block in self._blocks)
        idle = idle and not (self._warm_up and self._warm_up.is_running)
        while True:
            try:
                request = self._inbox.get(block=idle and not self._closing)
            except queue.Empty:
                break
            idle = False
            if request is not None:  # which only wakes this thread
                self._queue.append(request)
        for waiting in [request for request in self._queue if request.finish_request]:
            self._queue.remove(waiting)
            self._finish(waiting, Chunk([], [], waiting.finish_request))
        return not self._closing

    def _feed_prompts(self) -> None:
        """Feed the prompts that have a slot to go to, within the prefill budget."""
        # A block computes with one set of weights: after `replace_weights`, an empty one takes the new ones.
        usable = [block for block in self._blocks if block.weights is self._weights or not block.running()]
        free = sum(request is None for block in usable for request in block.requests) - len(self._prefills)
        while self._queue and free > 0:
            free -= 1
            self._prefills.append(self._feeder.start(self._queue.popleft(), self._weights))
        budget = _PREFILL_BUDGET
        while self._prefills and budget > 0:
            prefill = self._prefills[0]
            if prefill.request.finish_request:
                self._prefills.popleft()
                self._finish(prefill.request, Chunk([], [], prefill.request.finish_request))
                continue
            if not prefill.is_complete:
                budget -= self._feeder.feed(prefill)
            if prefill.is_complete:
                if not self._admit(prefill):
                    break  # until a block is empty
                self._prefills.popleft()

    def _compute_ahead(self) -> None:
        """Feed a chunk of a conversation that was answered, unless anybody waits for something else."""
        if not self.prefixes.max_bytes:
            self._ahead = None
            self._answered.clear()
            return
        if self._queue or self._prefills or any(block.running() for block in self._blocks):
            return
        with self.prefixes.optional("computing a conversation ahead"):
            if self._ahead is None or self._ahead.weights is not self._weights:
                self._ahead = self._feeder.start(self._answered.popleft(), self._weights) if self._answered else None
            if self._ahead is not None:
                self._feeder.feed(self._ahead)
                if self._ahead.is_complete:
                    self._feeder.keep(self._ahead)
                    self._ahead = None
        if not self.prefixes.max_bytes:  # after an error, which may have left its keys and values in any state
            self._ahead = None
            self._answered.clear()

    def _admit(self, prefill: Prefill) -> bool:
        """Put a prompt into a slot of the fullest block with a free one: blocks without requests cost no time.

        Returns:
            False if no block with its weights has a free slot, and none is empty.
        """
        request = prefill.request
        free = [
            block
            for block in self._blocks
            if None in block.requests and (block.weights is prefill.weights or not block.running())
        ]
        if not free and request.max_tokens > 0:
            return False
        self.counters.prompt_tokens += len(request.prompt_ids)
        self.counters.reused_tokens += request.reused
        if request.boundaries is not None:
            self._unsaved.append(prefill)
        if request.max_tokens > 0:
            max(free, key=lambda block: len(block.running())).insert(prefill)
        else:
            self._finish(request, Chunk([], [], "length"))
        return True

    def _decode(self, block: SlotBlock, busy_blocks: int) -> None:
        """Generate some tokens in every slot of a block and deliver them."""
        for slot, request in block.running():
            if request.finish_request:
                self._release(block, slot, request, Chunk([], [], request.finish_request))
        running = block.running()
        if not running:
            return
        block.resize(0)
        steps = self._step_count(block, [request for _, request in running], busy_blocks)
        start = time.perf_counter()
        ids_BxN, logprobs = block.decode(steps)
        block.step_seconds = (time.perf_counter() - start) / steps
        host_logprobs = jax.device_get(logprobs) if any(request.logprobs for _, request in running) else None
        for slot, request in running:
            ids = [id_ for id_ in ids_BxN[slot, :steps].tolist() if id_ >= 0]
            slot_logprobs = jax.tree.map(lambda x, slot=slot: x[slot], host_logprobs) if request.logprobs else None
            chunk = self._chunk(request, ids, slot_logprobs)
            if chunk.finish_reason:
                self._release(block, slot, request, chunk)
            elif chunk.ids:
                request.on_chunk(chunk)

    def _step_count(self, block: SlotBlock, running: Sequence[Request], busy_blocks: int) -> int:
        """Return the number of steps of the next call: few for new sequences, then as many as a round has time for."""
        in_time = int(_ROUND_SECONDS / busy_blocks / block.step_seconds) if block.step_seconds else 1
        growing = 1 + 2 * min(request.generated for request in running)  # a low latency of the first token
        remaining = max(request.max_tokens - request.generated for request in running)
        return max(1, min(in_time, growing, MAX_STEPS, remaining))

    def _chunk(self, request: Request, ids: list[int], logprobs: Logprobs | None) -> Chunk:
        """Count the newly generated ids of a request and return them as a chunk."""
        if not request.generated and ids:
            self.counters.first_token.observe(time.perf_counter() - request.submitted_at)
        request.generated += len(ids)
        self.counters.generated_tokens += len(ids)
        finish_reason = "length" if request.generated >= request.max_tokens else ""
        stops = self.stop_ids if request.boundaries is None else self._chat_stop_ids
        if ids and ids[-1] in stops:
            ids = ids[:-1]
            finish_reason = "stop"
        return Chunk(ids, [] if logprobs is None else token_logprobs(logprobs, len(ids)), finish_reason)

    def _release(self, block: SlotBlock, slot: int, request: Request, last: Chunk) -> None:
        block.requests[slot] = None
        self._finish(request, last)

    def _finish(self, request: Request, last: Chunk) -> None:
        with self._lock:
            self._unfinished -= 1
        self.counters.finished[last.finish_reason] += 1
        self.counters.request_time.observe(time.perf_counter() - request.submitted_at)
        request.on_chunk(last)

    def _empty_block(self) -> SlotBlock:
        return SlotBlock(self._graph, self._weights, self.block_slots, self.window, self._masks)
