"""The engine: one thread that lets requests join, writes all of them on, and hands out tokens as they come.

A `Text` waits until a row is free, its prompt is fed in chunks (between the steps of the others, so that a long prompt
does not hold them up), it joins a block and leaves it at its end, at its stop, or when it is cancelled. What is
computed for it does not depend on who else is there (batching.py).
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from slm_jax.generation.decode import never_drawn, prepare
from slm_jax.generation.sampling import Sampling, controls
from slm_jax.run.load import LoadedRun
from slm_jax.serve import batching
from slm_jax.serve.batching import MOST_DRAWN, Fixed, Rows, Told
from slm_jax.serve.metrics import Counters
from slm_jax.utils.errors import UserError

_FEWEST_COLUMNS = 64  # of a block that has just begun; doubled as its texts grow
_CHUNKS = (16, 64, 256)  # tokens of a prompt fed at once: the least of these that takes all of it, or the last
_PROMPT_TOKENS = 512  # fed between two rounds of the texts that are being written, at most
_ROUND_SECONDS = 0.1  # how long a round over all blocks may take, about: how often each text hands out tokens
_SAY_SECONDS = 2.0


class Full(Exception):  # noqa: N818  # a state, as in queue.Full
    """As many texts wait as may wait."""


class Place(NamedTuple):
    """What the model thought of one place: the log-probability of the id there, and the most probable ids' (five)."""

    logprob: float
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """What a text hands out: new ids, with a `Place` for each where it was asked for; how it ended, at its last."""

    ids: list[int]
    places: list[Place]
    end: str = ""
    """stop (an id that ends a text, left out of `ids`), length, cancelled, or error."""


@dataclass(eq=False)
class Text:
    """A prompt and what is to be made of it."""

    ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    hand_out: Callable[[Piece], None]
    """Called on the engine's thread, with one Piece after another; the last one has an `end`."""
    told: bool = False
    """Hand out a `Place` with each id."""
    prompt_told: bool = False
    """Hand out, first, the prompt's ids but the first, with a `Place` each."""
    endless: bool = False
    """Never draw what ends a text."""
    leave: str = ""
    """Set from any thread: the text ends at the next round, with this as its `end`."""
    asked_at: float = field(default_factory=time.perf_counter)
    drawn: int = 0


@dataclass
class _Prompt:
    """A prompt on its way into a row."""

    text: Text
    cache: Any
    chunk: int
    fed: int = 0
    logits_V: Any = None


@dataclass
class _Rows:
    """A block, and who is in its rows."""

    state: batching.Block
    texts: list[Text | None]
    seconds: float = 0.0  # of a step, at the last call

    @property
    def columns(self) -> int:
        return self.state.cache.positions.shape[1]

    def busy(self) -> list[tuple[int, Text]]:
        return [(row, text) for row, text in enumerate(self.texts) if text is not None]


class Engine:
    """Continuous batching of one run's model.

    slots: texts written at once, at most. rows: of them, in one compiled program, 0: eight on a CPU (whose caches hold
    what eight rows need) and all elsewhere. waiting: texts that may wait beyond these.
    """

    def __init__(self, run: LoadedRun, slots: int = 32, waiting: int = 64, rows: int = 0, context: int = 0):
        self.run, self.waiting = run, waiting
        self.rows = min(rows or (8 if jax.default_backend() == "cpu" else slots), slots)
        self.slots = -(-slots // self.rows) * self.rows
        model = run.model
        self.window = min(w for w in (context or run.context, model.config.window or run.context) if w)
        self.eos = run.tokenizer.token2id["<EOS>"]
        self.counters = Counters()
        self.failure: BaseException | None = None
        self._graph, params = nnx.split(model, nnx.Param)
        self._weights = prepare(self._graph, params)
        self._fixed = Fixed(_mask(never_drawn(run.tokenizer), model.vocab_size), _mask([self.eos], model.vocab_size))
        full = -(-self.window // _FEWEST_COLUMNS) * _FEWEST_COLUMNS
        self._columns = [c for c in (_FEWEST_COLUMNS << i for i in range(32)) if c < full] + [full]
        self._blocks = [self._empty_block() for _ in range(self.slots // self.rows)]
        self._inbox: queue.SimpleQueue[Text | None] = queue.SimpleQueue()
        self._queue: deque[Text] = deque()
        self._prompts: deque[_Prompt] = deque()
        self._lock = threading.Lock()
        self._inside = 0  # texts submitted and not ended
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name=f"engine {run.run.path.name}", daemon=True)

    # From any thread

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(self, texts: Sequence[Text]) -> None:
        """Take texts, all or none. Raises Full, and UserError for what cannot be served."""
        size = self.run.model.vocab_size
        for text in texts:
            if not text.ids or not all(0 <= id_ < size for id_ in text.ids):
                raise UserError(f"a prompt must have ids, each from 0 to {size - 1}")
            text.sampling.check()
        with self._lock:
            if self._closing or self.failure:
                raise UserError("the engine has stopped")
            if self._inside + len(texts) > self.slots + self.waiting:
                raise Full
            self._inside += len(texts)
        for text in texts:
            self._inbox.put(text)

    def state(self) -> tuple[int, int]:
        """(texts being written, texts that wait)."""
        writing = sum(len(block.busy()) for block in self._blocks)
        return writing, max(self._inside - writing, 0)

    def close(self) -> None:
        """End all texts as cancelled, and the thread."""
        with self._lock:
            self._closing = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def warm_up(self, say: Callable[[str], None] = lambda text: None) -> float:
        """Compile what requests will need, by serving such requests (before `start`); the seconds it took."""
        clock = time.perf_counter()
        last = clock
        # One of each size of prompt and of block, and back to the smallest block.
        lengths = sorted({1, *(chunk + 1 for chunk in _CHUNKS[:-1])} | {max(c - MOST_DRAWN, 1) for c in self._columns})
        jobs = [(length, told) for length in [*lengths, 1] for told in (False, True)]
        for i, (length, told) in enumerate(jobs):
            if time.perf_counter() - last > _SAY_SECONDS:
                last = time.perf_counter()
                say(f"compiling {i + 1} of {len(jobs)} ({last - clock:.0f} s)")
            self.submit([Text([0] * length, 1, Sampling(), lambda piece: None, told, told, endless=True)])
            while self._inside:
                self._round()
        self.counters = Counters()
        return time.perf_counter() - clock

    # On the engine's thread

    def _serve(self) -> None:
        try:
            while self._round():
                pass
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._lock:
                self._closing = True
            self._take_in()
            for block in self._blocks:
                for row, text in block.busy():
                    self._leave(block, row, text, Piece([], [], "error" if self.failure else "cancelled"))
            for text in [*(prompt.text for prompt in self._prompts), *self._queue]:
                self._end(text, Piece([], [], "error" if self.failure else "cancelled"))
            self._prompts.clear()
            self._queue.clear()

    def _round(self) -> bool:
        """Bring in, feed, and write on each block; who comes meanwhile is seen between two blocks. False: the engine is
        being closed."""
        for number, block in enumerate(self._blocks):
            if not self._take_in(wait=number == 0):
                return False
            self._feed_prompts()
            if block.busy():
                self._write(block, sum(bool(each.busy()) for each in self._blocks))
        return True

    def _take_in(self, wait: bool = False) -> bool:
        """Bring in who has come; wait for somebody where nobody is here. False: the engine is being closed."""
        idle = wait and not self._queue and not self._prompts and not any(block.busy() for block in self._blocks)
        while True:
            try:
                text = self._inbox.get(block=idle and not self._closing)
            except queue.Empty:
                break
            if text is None:
                self._closing = True
            else:
                self._queue.append(text)
                idle = False
            if self._closing and self._inbox.empty():
                break
        for waiting in [text for text in self._queue if text.leave]:
            self._queue.remove(waiting)
            self._end(waiting, Piece([], [], waiting.leave))
        return not self._closing

    def _feed_prompts(self) -> None:
        """Feed prompts that have a row to go to: all of them where nobody else is being written."""
        free = sum(text is None for block in self._blocks for text in block.texts) - len(self._prompts)
        while self._queue and free > 0:
            free -= 1
            text = self._queue.popleft()
            chunk = next((chunk for chunk in _CHUNKS if len(text.ids) <= chunk), _CHUNKS[-1])
            self._prompts.append(_Prompt(text, self._empty_prompt(chunk), chunk))
        budget = _PROMPT_TOKENS
        while self._prompts and budget > 0:
            prompt = self._prompts[0]
            if prompt.text.leave:
                self._end(self._prompts.popleft().text, Piece([], [], prompt.text.leave))
                continue
            budget -= prompt.chunk
            self._feed(prompt)
            if prompt.fed == len(prompt.text.ids):
                self._join(self._prompts.popleft())

    def _feed(self, prompt: _Prompt) -> None:
        """One chunk."""
        text, first = prompt.text, prompt.fed
        ids = np.asarray(text.ids[first : first + prompt.chunk], np.int32)
        following = np.asarray(text.ids[first + 1 : first + 1 + prompt.chunk], np.int32)
        prompt.fed += len(ids)
        prompt.cache, prompt.logits_V, told = batching.feed_prompt(
            self._graph, self._weights, prompt.cache, _padded(ids, prompt.chunk), np.int32(first), np.int32(len(ids)),
            _padded(following, prompt.chunk), self.window, text.prompt_told,
        )  # fmt: skip
        if told is not None and len(following):
            text.hand_out(Piece(following.tolist(), _places(told, len(following))))

    def _join(self, prompt: _Prompt) -> None:
        """Into a row of the fullest block that has room: the others then take no time."""
        text = prompt.text
        self.counters.prompt_tokens += len(text.ids)
        if text.max_tokens < 1:
            self._end(text, Piece([], [], "length"))
            return
        room = [block for block in self._blocks if None in block.texts]
        block = max(room, key=lambda block: len(block.busy()))
        row = block.texts.index(None)
        self._fit(block, len(text.ids))
        block.state = batching.join(
            block.state, np.int32(row), prompt.cache, np.int32(len(text.ids)), prompt.logits_V,
            _mask(text.ids, self.run.model.vocab_size),
        )  # fmt: skip
        block.texts[row] = text

    def _fit(self, block: _Rows, least: int) -> None:
        """Give a block the columns that its texts, and one of `least` tokens, need; fewer when half would do."""
        needed = max([least, *(len(text.ids) + text.drawn + MOST_DRAWN for _, text in block.busy())])
        wanted = sum(c < needed for c in self._columns[:-1])  # the place of the least that suffices
        at = self._columns.index(block.columns)
        # A text that has gone round holds on to its columns; so does one that would soon want them back.
        if wanted < at and 2 * needed > block.columns:
            return
        while at != wanted:  # by single steps, which are few programs
            at += 1 if at < wanted else -1
            block.state = batching.resize(block.state, self._columns[at])

    def _write(self, block: _Rows, blocks: int) -> None:
        """Some tokens of each text in a block."""
        for row, text in block.busy():
            if text.leave:
                self._leave(block, row, text, Piece([], [], text.leave))
        busy = block.busy()
        if not busy:
            return
        self._fit(block, 0)
        left = [text.max_tokens - text.drawn for _, text in busy]
        # A first token soon; then as many as a round has time for.
        steps = int(_ROUND_SECONDS / blocks / block.seconds) if block.seconds else 1
        steps = max(1, min(steps, 1 + 2 * min(text.drawn for _, text in busy), MOST_DRAWN, max(left)))
        clock = time.perf_counter()
        ids_BxN, told = self._draw(block, steps)
        block.seconds = (time.perf_counter() - clock) / steps
        host_told = jax.device_get(told) if any(text.told for _, text in busy) else None
        for row, text in busy:
            drawn = [id_ for id_ in ids_BxN[row, :steps].tolist() if id_ >= 0]
            if not text.drawn and drawn:
                self.counters.first_token.observe(time.perf_counter() - text.asked_at)
            text.drawn += len(drawn)
            self.counters.drawn_tokens += len(drawn)
            ended = bool(drawn) and drawn[-1] == self.eos
            ids = drawn[:-1] if ended else drawn
            told_row = jax.tree.map(lambda x, row=row: x[row], host_told) if text.told else None
            places = [] if told_row is None else _places(told_row, len(ids))
            piece = Piece(ids, places, "stop" if ended else "length" if text.drawn >= text.max_tokens else "")
            if piece.end:
                self._leave(block, row, text, piece)
            elif ids:
                text.hand_out(piece)

    def _draw(self, block: _Rows, steps: int) -> tuple[np.ndarray, Told]:
        """One call of the compiled loop: ids [B, N] on the host."""
        texts = block.texts
        of = [text or _NOBODY for text in texts]
        rows = Rows(
            position_B=np.array([len(text.ids) + text.drawn for text in of], np.int32),
            drawn_B=np.array([text.drawn for text in of], np.int32),
            left_B=np.array([text.max_tokens - text.drawn for text in of], np.int32),
            seed_B=np.array([text.sampling.seed for text in of], np.uint32),
            endless_B=np.array([text.endless for text in of], bool),
            told_B=np.array([text.told for text in of], bool),
            controls=controls([text.sampling for text in of]),
        )
        arguments = (self._graph, self._weights, block.state, rows, self._fixed, np.int32(steps), self.window)
        block.state, ids_BxN, told = batching.draw(*arguments)
        return np.asarray(ids_BxN), told

    def _leave(self, block: _Rows, row: int, text: Text, piece: Piece) -> None:
        block.texts[row] = None
        self._end(text, piece)

    def _end(self, text: Text, piece: Piece) -> None:
        with self._lock:
            self._inside -= 1
        self.counters.ended[piece.end] += 1
        self.counters.whole_text.observe(time.perf_counter() - text.asked_at)
        text.hand_out(piece)

    def _empty_block(self) -> _Rows:
        return _Rows(batching.empty_block(self._graph, self._weights, self.rows, self._columns[0]), [None] * self.rows)

    def _empty_prompt(self, chunk: int) -> Any:
        columns = -(-(self.window + chunk - 1) // chunk) * chunk
        return batching.empty_prompt(self._graph, self._weights, columns)


_NOBODY = Text((), 0, Sampling(temperature=0), lambda piece: None)


def _places(told: Told, count: int) -> list[Place]:
    """Of the first `count` places of one row."""
    of_id, ids, of_ids = (np.asarray(x)[:count].tolist() for x in told)
    return [Place(p, list(zip(i, q, strict=True))) for p, i, q in zip(of_id, ids, of_ids, strict=True)]


def _padded(ids: np.ndarray, length: int) -> np.ndarray:
    return np.pad(ids, (0, length - len(ids)))


def _mask(ids: Sequence[int], size: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[list(ids)] = True
    return mask
