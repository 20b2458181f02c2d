"""A request for texts while the engine generates them: what completions and chat completions have in common."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slm_jax.serve.detokenizer import IncrementalDetokenizer, Token
from slm_jax.serve.engine import Engine
from slm_jax.serve.errors import ApiError
from slm_jax.serve.requests import Chunk, EngineClosedError, QueueFullError, Request
from slm_jax.serve.responses import TokenDetail, Usage
from slm_jax.utils.text_tokenizer import TextTokenizer
from tokenizer import HybridTokenizer
from tokenizer.inspect.playground import token_kind


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        prompt_tokens: Maximum number of tokens of a prompt.
        max_tokens: Maximum number of generated tokens per text.
        seconds: Maximum time until the response is complete, waiting included.
    """

    prompt_tokens: int
    max_tokens: int
    seconds: float


@dataclass
class Choice:
    """One text of a response while it grows.

    Attributes:
        index: Index in the response.
        request: The engine's request.
        detokenizer: Text of the ids received so far.
        echo: The prompt's text if it is to be repeated.
        echo_tokens: The prompt's tokens if they are asked for and the engine delivers no log-probabilities of them.
        finish_reason: stop, length, or the engine's internal cancelled and error; empty until the end.
        generated: Number of generated tokens up to the end of the text: the engine may generate some more before it
            learns of a stop string, but how many depends on timing.
        pending_prompt_tokens: Number of prompt tokens that the engine has yet to deliver, before generated ones.
    """

    index: int
    request: Request
    detokenizer: IncrementalDetokenizer
    echo: str
    echo_tokens: list[Token] = field(default_factory=list)
    finish_reason: str = ""
    generated: int = 0
    pending_prompt_tokens: int = 0


class Answer:
    """A request while it is answered.

    Call `encode` of a subclass (in any thread), then `submit`, then `response` or `events` of it.

    Attributes:
        choices: The texts.
    """

    def __init__(self, engine: Engine, limits: Limits, kind: str):
        """Prepare an answer on the running event loop.

        Args:
            engine: The engine of the model.
            limits: Limits of the server.
            kind: Prefix of the response's id.
        """
        self.choices: list[Choice] = []
        self._engine = engine
        self._limits = limits
        self._tokenizer = engine.run.tokenizer
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[tuple[Choice, Chunk]] = asyncio.Queue()
        self._id = f"{kind}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._prompt_tokens = 0

    def _check_size(self, max_tokens: int, name: str, count: int) -> None:
        """Refuse more tokens or texts than the server allows; `name` is that of the parameter."""
        if max_tokens > self._limits.max_tokens:
            message = f"{name} {max_tokens:,} exceeds the limit of {self._limits.max_tokens:,}"
            raise ApiError(400, message, name)
        if count > self._capacity:
            message = f"{count:,} texts in one request exceed the server's limit of {self._capacity}"
            raise ApiError(400, message, "n")

    @property
    def _capacity(self) -> int:
        """Number of requests that the engine accepts at most."""
        return self._engine.slots + self._engine.queue_size

    def _on_chunk(self, choice: Choice, chunk: Chunk) -> None:
        """Receive a chunk on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, (choice, chunk))
        except RuntimeError:  # the event loop is closed: the server has stopped
            choice.request.finish("cancelled")

    def submit(self) -> None:
        """Submit the requests to the engine.

        Raises:
            ApiError: The queue is full (429), or the engine has stopped, as one does whose model was replaced (503).
        """
        try:
            self._engine.submit([choice.request for choice in self.choices])
        except QueueFullError:
            message = f"the server is busy: {self._capacity} texts are running or waiting. Try again later"
            raise ApiError(429, message, code="busy", retry_after=1) from None
        except EngineClosedError:
            raise ApiError(503, "this model is not served any more: GET /v1/models lists those that are") from None

    def cancel(self) -> None:
        """Free the slots of unfinished texts."""
        for choice in self.choices:
            choice.request.finish("cancelled")

    async def deltas(self) -> AsyncGenerator[tuple[Choice, str, list[Token]], None]:
        """Receive text as it is generated; unfinished texts are canceled when the generator is closed.

        Yields:
            The choice, its new text and the tokens of it. With the last text of a choice its `finish_reason` is set.

        Raises:
            ApiError: The time limit is reached, or the engine failed.
        """
        try:
            async with asyncio.timeout(self._limits.seconds):
                for choice in self.choices:
                    if (choice.echo or choice.echo_tokens) and not choice.pending_prompt_tokens:
                        yield choice, choice.echo, choice.echo_tokens
                while not all(choice.finish_reason for choice in self.choices):
                    choice, chunk = await self._chunks.get()
                    if choice.finish_reason:
                        continue
                    text, tokens = self._process(choice, chunk)
                    if choice.finish_reason in ("cancelled", "error"):
                        raise ApiError(503, "the server stopped before the text was complete")
                    if text or tokens or choice.finish_reason:
                        yield choice, text, tokens
        except TimeoutError:
            raise ApiError(504, f"not complete within {self._limits.seconds:g} s", code="timeout") from None
        finally:
            self.cancel()

    async def collect(self) -> tuple[list[str], list[list[Token]]]:
        """Return the whole text of each choice and the tokens of it.

        Raises:
            ApiError: See `deltas`.
        """
        texts = [""] * len(self.choices)
        tokens: list[list[Token]] = [[] for _ in self.choices]
        async for choice, new_text, new_tokens in self.deltas():
            texts[choice.index] += new_text
            tokens[choice.index] += new_tokens
        return texts, tokens

    def _process(self, choice: Choice, chunk: Chunk) -> tuple[str, list[Token]]:
        """Add a chunk to a choice; returns the text and the tokens that it completes."""
        choice.detokenizer.append(chunk.ids, chunk.logprobs)
        choice.generated = choice.detokenizer.count
        if chunk.finish_reason:
            choice.detokenizer.finish()
            choice.finish_reason = chunk.finish_reason
        if choice.detokenizer.stopped:
            choice.finish_reason = "stop"
            choice.request.finish("stop")
        return choice.detokenizer.release(final=bool(choice.finish_reason))

    def usage(self) -> Usage:
        """Return the token counts so far."""
        generated = sum(choice.generated for choice in self.choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
        }


def format_event(content: Mapping[str, Any]) -> str:
    """Return a server-sent event with JSON data."""
    return f"data: {json.dumps(content)}\n\n"


def _kind(tokenizer: TextTokenizer, id_: int) -> str:
    """Return how the page shows a token; of a foreign tokenizer only special ones are known."""
    if isinstance(tokenizer, HybridTokenizer):
        return token_kind(tokenizer, id_)
    return "other" if tokenizer.token_bytes[id_] else "special"


def format_details(tokenizer: TextTokenizer, tokens: Sequence[Token]) -> list[TokenDetail]:
    """Return the tokens as the page shows them: id, text, name, kind, log-probability, most probable alternatives."""
    names = tokenizer.id2token
    return [
        {
            "id": token.id,
            "text": token.text,
            "name": names[token.id],
            "kind": _kind(tokenizer, token.id),
            "logprob": token.logprob.logprob if token.logprob else None,
            "top": [[id_, names[id_], value] for id_, value in token.logprob.top] if token.logprob else [],
        }
        for token in tokens
    ]
