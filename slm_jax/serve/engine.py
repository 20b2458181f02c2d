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
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from slm_jax.generation.decode import id_mask, prepare_weights, suppressed_ids
from slm_jax.generation.sampling import Sampling, stack_sampling
from slm_jax.run.load import LoadedRun
from slm_jax.serve import batching
from slm_jax.serve.batching import MAX_STEPS, Logprobs, SlotInputs, TokenMasks
from slm_jax.serve.metrics import Counters
from slm_jax.serve.requests import Chunk, EngineClosedError, Occupancy, Progress, QueueFullError, Request, TokenLogprob
from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

_MIN_COLUMNS = 64  # of an empty block; doubled as its sequences grow
_CHUNKS = (16, 64, 256)  # sizes of a prefill chunk: the smallest that holds the whole prompt, or the last
_PREFILL_BUDGET = 512  # maximum number of prompt tokens fed between two decoding calls
_ROUND_SECONDS = 0.1  # approximate time of a round over all blocks, and so between two chunks of a request
_LOG_SECONDS = 2.0  # time between two log lines of the warm-up


@dataclass
class _Prefill:
    """A prompt on its way into a slot."""

    request: Request
    cache: Any
    chunk: int
    weights: Any
    fed: int = 0
    logits_V: Any = None


@dataclass
class _Block:
    """Host state of a block of slots."""

    state: batching.Block
    requests: list[Request | None]  # by slot
    weights: Any  # those that its requests began with
    step_seconds: float = 0.0  # of a decoding step, at the last call

    @property
    def columns(self) -> int:
        return self.state.cache.positions.shape[1]

    def running(self) -> list[tuple[int, Request]]:
        return [(slot, request) for slot, request in enumerate(self.requests) if request is not None]


class _WarmUp:
    """State of the warm-up: its own block, and the prompts that are still to be served."""

    def __init__(self, block: _Block, prompts: deque[tuple[int, bool]]):
        self.block: _Block | None = block
        self.prompts = prompts
        self.total = len(prompts)
        self.start = time.perf_counter()
        self._last_log = self.start

    @property
    def progress(self) -> Progress:
        return Progress(self.total - len(self.prompts), self.total)

    def log(self, name: str) -> None:
        """Log the progress, at most once in some seconds."""
        now = time.perf_counter()
        if now - self._last_log > _LOG_SECONDS:
            self._last_log = now
            logger.info("%s: compiling %d of %d (%.0f s)", name, self.progress.done + 1, self.total, now - self.start)


class Engine:
    """Continuous batching of one run's model.

    Attributes:
        run: The run that is served.
        name: Name in log messages.
        slots: Number of requests decoded at the same time.
        block_slots: Number of slots that one compiled program decodes.
        queue_size: Number of requests that may wait beyond the slots.
        window: Number of tokens that attention sees.
        stop_ids: Ids that end a sequence.
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
    ):
        """Allocate the blocks; nothing is compiled for requests yet, see `start`.

        Args:
            run: The run to serve.
            slots: Number of requests decoded at the same time, rounded up to whole blocks.
            queue_size: Number of requests that may wait beyond these.
            block_slots: Slots per compiled program; 0: eight on a CPU (whose caches hold what eight slots need), all
                slots on other devices.
            context: Number of tokens that attention sees; 0: the length that the model was trained at.
            name: Name in log messages; empty: that of the run directory.
        """
        self.run = run
        self.name = name or run.run.path.name
        self._options = (slots, queue_size, block_slots, context)
        self.queue_size = queue_size
        model = run.model
        self.block_slots = min(block_slots or (8 if model.platform.name == "cpu" else slots), slots)
        self.slots = -(-slots // self.block_slots) * self.block_slots
        self.window = min(w for w in (context or run.context, model.config.longest_window or run.context) if w)
        self.stop_ids = tuple(run.tokenizer.stop_ids)
        self.counters = Counters()
        self.failure: BaseException | None = None
        self._graph, params = nnx.split(model, nnx.Param)
        self._weights = prepare_weights(self._graph, params)
        self._masks = TokenMasks(
            id_mask(suppressed_ids(run.tokenizer), model.vocab_size), id_mask(self.stop_ids, model.vocab_size)
        )
        full = -(-self.window // _MIN_COLUMNS) * _MIN_COLUMNS
        self._columns = [c for c in (_MIN_COLUMNS << i for i in range(32)) if c < full] + [full]
        self._blocks = [self._empty_block() for _ in range(self.slots // self.block_slots)]
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._queue: deque[Request] = deque()
        self._prefills: deque[_Prefill] = deque()
        self._lock = threading.Lock()
        self._unfinished = 0  # requests submitted and not finished
        self._closing = False
        self._warm_up: _WarmUp | None = None
        self._thread = threading.Thread(target=self._serve, name=f"engine {self.name}", daemon=True)

    # Called from any thread.

    def start(self, warm_up: bool = False) -> None:
        """Start the engine's thread.

        Args:
            warm_up: Compile every program that requests will need, short prompts and texts first. Requests may be
                submitted meanwhile: they are served between two programs.
        """
        if warm_up:
            self._warm_up = _WarmUp(self._empty_block(), self._warm_up_prompts())
        self._thread.start()

    def for_run(self, run: LoadedRun, name: str) -> "Engine":
        """Return an engine of another run, with the options of this one."""
        return Engine(run, *self._options, name)

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
        self.run = run

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
        if self._warm_up and self._warm_up.prompts:
            self._compile_next(self._warm_up)
        for number, block in enumerate(self._blocks):
            if not self._drain_inbox(wait=number == 0):
                return False
            self._feed_prompts()
            if block.running():
                self._decode(block, sum(bool(each.running()) for each in self._blocks))
        return True

    def _drain_inbox(self, wait: bool = False) -> bool:
        """Move submitted requests to the queue and drop canceled ones; with `wait`, block while the engine is idle.

        Returns:
            False once the engine is being closed.
        """
        busy = self._queue or self._prefills or (self._warm_up and self._warm_up.prompts)
        idle = wait and not busy and not any(block.running() for block in self._blocks)
        while True:
            try:
                request = self._inbox.get(block=idle and not self._closing)
            except queue.Empty:
                break
            if request is None:
                self._closing = True
            else:
                self._queue.append(request)
                idle = False
            if self._closing and self._inbox.empty():
                break
        for waiting in [request for request in self._queue if request.finish_request]:
            self._queue.remove(waiting)
            self._finish(waiting, Chunk([], [], waiting.finish_request))
        return not self._closing

    def _warm_up_prompts(self) -> deque[tuple[int, bool]]:
        """Return lengths of prompts that need every program, and whether to compute their log-probabilities."""
        # One prompt per chunk size and per block size, then one that shrinks the block to the smallest size.
        chunks = {1, *(chunk + 1 for chunk in _CHUNKS[:-1])}
        lengths = sorted(chunks | {max(columns - MAX_STEPS, 1) for columns in self._columns})
        return deque([*((length, False) for length in [*lengths, 1]), *((length, True) for length in sorted(chunks))])

    def _compile_next(self, warm_up: "_WarmUp") -> None:
        """Serve one request in a block that no client's request is in, and that no statistics count."""
        block = warm_up.block
        assert block is not None
        warm_up.log(self.name)
        length, logprobs = warm_up.prompts[0]
        request = Request([0] * length, 1, Sampling(), lambda chunk: None, logprobs, logprobs, ignore_eos=True)
        prefill = self._start_prefill(request)
        while prefill.fed < length:
            self._feed_chunk(prefill)
        slot = self._insert(block, prefill)
        self._resize(block, 0)
        self._call_decode(block, 1)
        block.requests[slot] = None
        warm_up.prompts.popleft()
        if not warm_up.prompts:
            seconds = time.perf_counter() - warm_up.start
            message = "%s: %d slots in blocks of %d; compiled in %.1f s"
            logger.info(message, self.name, self.slots, self.block_slots, seconds)
            warm_up.block = None

    def _start_prefill(self, request: Request) -> _Prefill:
        chunk = next((chunk for chunk in _CHUNKS if len(request.prompt_ids) <= chunk), _CHUNKS[-1])
        return _Prefill(request, self._empty_prompt_cache(chunk), chunk, self._weights)

    def _feed_prompts(self) -> None:
        """Feed the prompts that have a slot to go to, within the prefill budget."""
        # A block computes with one set of weights: after `replace_weights`, an empty one takes the new ones.
        usable = [block for block in self._blocks if block.weights is self._weights or not block.running()]
        free = sum(request is None for block in usable for request in block.requests) - len(self._prefills)
        while self._queue and free > 0:
            free -= 1
            self._prefills.append(self._start_prefill(self._queue.popleft()))
        budget = _PREFILL_BUDGET
        while self._prefills and budget > 0:
            prefill = self._prefills[0]
            if prefill.request.finish_request:
                self._prefills.popleft()
                self._finish(prefill.request, Chunk([], [], prefill.request.finish_request))
                continue
            if prefill.fed < len(prefill.request.prompt_ids):
                budget -= prefill.chunk
                self._feed_chunk(prefill)
            if prefill.fed == len(prefill.request.prompt_ids):
                if not self._admit(prefill):
                    break  # until a block is empty
                self._prefills.popleft()

    def _feed_chunk(self, prefill: _Prefill) -> None:
        """Feed the next chunk of a prompt, and deliver its log-probabilities if they were asked for."""
        request = prefill.request
        first = prefill.fed
        ids = np.asarray(request.prompt_ids[first : first + prefill.chunk], np.int32)
        next_ids = np.asarray(request.prompt_ids[first + 1 : first + 1 + prefill.chunk], np.int32)
        prefill.fed += len(ids)
        prefill.cache, prefill.logits_V, logprobs = batching.prefill_chunk(
            self._graph,
            prefill.weights,
            prefill.cache,
            _pad(ids, prefill.chunk),
            np.int32(first),
            np.int32(len(ids)),
            _pad(next_ids, prefill.chunk),
            self.window,
            request.prompt_logprobs,
        )
        if logprobs is not None and len(next_ids):
            request.on_chunk(Chunk(next_ids.tolist(), _token_logprobs(logprobs, len(next_ids))))

    def _admit(self, prefill: _Prefill) -> bool:
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
        if request.max_tokens > 0:
            self._insert(max(free, key=lambda block: len(block.running())), prefill)
        else:
            self._finish(request, Chunk([], [], "length"))
        return True

    def _insert(self, block: _Block, prefill: _Prefill) -> int:
        """Put a prompt into a free slot of a block; returns the slot."""
        request = prefill.request
        slot = block.requests.index(None)
        self._resize(block, len(request.prompt_ids))
        block.state = batching.insert(
            block.state,
            np.int32(slot),
            prefill.cache,
            np.int32(len(request.prompt_ids)),
            prefill.logits_V,
            id_mask(request.prompt_ids, self.run.model.vocab_size),
        )
        block.requests[slot] = request
        block.weights = prefill.weights
        return slot

    def _resize(self, block: _Block, length: int) -> None:
        """Give a block the columns that its sequences, and one of `length` tokens, need; fewer if half would do."""
        needed = max([length, *(request.length + MAX_STEPS for _, request in block.running())])
        wanted = sum(columns < needed for columns in self._columns[:-1])  # index of the smallest sufficient size
        index = self._columns.index(block.columns)
        # A sequence whose buffer has wrapped keeps its columns; so does one that would soon need them again.
        if wanted < index and 2 * needed > block.columns:
            return
        while index != wanted:  # by single steps, so that few programs are compiled
            index += 1 if index < wanted else -1
            block.state = batching.resize(block.state, self._columns[index])

    def _decode(self, block: _Block, busy_blocks: int) -> None:
        """Generate some tokens in every slot of a block and deliver them."""
        for slot, request in block.running():
            if request.finish_request:
                self._release(block, slot, request, Chunk([], [], request.finish_request))
        running = block.running()
        if not running:
            return
        self._resize(block, 0)
        steps = self._step_count(block, [request for _, request in running], busy_blocks)
        start = time.perf_counter()
        ids_BxN, logprobs = self._call_decode(block, steps)
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

    def _step_count(self, block: _Block, running: Sequence[Request], busy_blocks: int) -> int:
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
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
            finish_reason = "stop"
        return Chunk(ids, [] if logprobs is None else _token_logprobs(logprobs, len(ids)), finish_reason)

    def _call_decode(self, block: _Block, steps: int) -> tuple[np.ndarray, Logprobs]:
        """Call the compiled loop; returns ids [B, N] on the host and log-probabilities on the device."""
        requests = [request or _NO_REQUEST for request in block.requests]
        inputs = SlotInputs(
            position_B=np.array([request.length for request in requests], np.int32),
            generated_B=np.array([request.generated for request in requests], np.int32),
            remaining_B=np.array([request.max_tokens - request.generated for request in requests], np.int32),
            seed_B=np.array([request.sampling.seed for request in requests], np.uint32),
            ignore_eos_B=np.array([request.ignore_eos for request in requests], bool),
            logprobs_B=np.array([request.logprobs for request in requests], bool),
            sampling=stack_sampling([request.sampling for request in requests]),
        )
        block.state, ids_BxN, logprobs = batching.decode(
            self._graph, block.weights, block.state, inputs, self._masks, np.int32(steps), self.window
        )
        return np.asarray(ids_BxN), logprobs

    def _release(self, block: _Block, slot: int, request: Request, last: Chunk) -> None:
        block.requests[slot] = None
        self._finish(request, last)

    def _finish(self, request: Request, last: Chunk) -> None:
        with self._lock:
            self._unfinished -= 1
        self.counters.finished[last.finish_reason] += 1
        self.counters.request_time.observe(time.perf_counter() - request.submitted_at)
        request.on_chunk(last)

    def _empty_block(self) -> _Block:
        state = batching.empty_block(self._graph, self._weights, self.block_slots, self._columns[0])
        return _Block(state, [None] * self.block_slots, self._weights)

    def _empty_prompt_cache(self, chunk: int) -> Any:
        columns = -(-(self.window + chunk - 1) // chunk) * chunk
        return batching.empty_prompt_cache(self._graph, self._weights, columns)


_NO_REQUEST = Request((), 0, Sampling(temperature=0), lambda chunk: None)  # stands for an empty slot


def _token_logprobs(logprobs: Logprobs, count: int) -> list[TokenLogprob]:
    """Return the first `count` log-probabilities of one sequence."""
    token, top_ids, top = (np.asarray(x)[:count].tolist() for x in logprobs)
    return [
        TokenLogprob(value, list(zip(ids, values, strict=True)))
        for value, ids, values in zip(token, top_ids, top, strict=True)
    ]


def _pad(ids: np.ndarray, length: int) -> np.ndarray:
    return np.pad(ids, (0, length - len(ids)))
