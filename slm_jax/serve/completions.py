"""POST /v1/completions: turn a request into engine requests, and their chunks into a response or an event stream."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slm_jax.generation.decode import encode_prompt
from slm_jax.generation.sampling import Sampling
from slm_jax.serve.detokenizer import IncrementalDetokenizer, Token
from slm_jax.serve.engine import Engine
from slm_jax.serve.errors import ApiError
from slm_jax.serve.requests import Chunk, EngineClosedError, QueueFullError, Request
from slm_jax.serve.responses import ChoiceBody, CompletionBody, Logprobs, TokenDetail, Usage
from slm_jax.serve.schema import CompletionRequest
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


class Completion:
    """One completion request while it is answered.

    Call `encode` (in any thread), then `submit`, then `response` or `events`.
    """

    def __init__(self, name: str, engine: Engine, request: CompletionRequest, limits: Limits):
        """Prepare a completion on the running event loop.

        Args:
            name: Name of the model in the response.
            engine: Its engine.
            request: The validated request.
            limits: Limits of the server.
        """
        self.request = request
        self.choices: list[Choice] = []
        self._engine = engine
        self._limits = limits
        self._tokenizer = engine.run.tokenizer
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[tuple[Choice, Chunk]] = asyncio.Queue()
        self._header: CompletionBody = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "choices": [],
        }
        self._prompt_tokens = 0

    def encode(self) -> None:
        """Encode the prompts and make the engine's requests.

        Raises:
            ApiError: The request exceeds a limit of the server.
        """
        request = self.request
        if request.max_tokens > self._limits.max_tokens:
            message = f"max_tokens {request.max_tokens:,} exceeds the limit of {self._limits.max_tokens:,}"
            raise ApiError(400, message, "max_tokens")
        count = len(request.prompts()) * request.n
        if count > self._capacity:
            message = f"{count:,} texts in one request exceed the server's limit of {self._capacity}"
            raise ApiError(400, message, "n")
        sampling = request.sampling()
        prompts: Sequence[Any] = request.prompts()
        for index, prompt in enumerate(prompts):
            ids = self._encode_prompt(prompt, "prompt" if prompts != request.prompt else f"prompt[{index}]")
            self._prompt_tokens += len(ids)
            for sample in range(request.n):
                choice = self._choice(len(self.choices), prompt, ids, sampling.with_seed_offset(sample))
                self.choices.append(choice)

    @property
    def _capacity(self) -> int:
        """Number of requests that the engine accepts at most."""
        return self._engine.slots + self._engine.queue_size

    def _encode_prompt(self, prompt: str | list[int], name: str) -> list[int]:
        """Return the ids of a prompt; `name` is its path in the request."""
        limit = self._limits.prompt_tokens
        # A prompt that needs more tokens even if all are the longest one is refused without encoding it.
        if isinstance(prompt, str) and len(prompt) > self._engine.longest_token * limit:
            message = f"{name} has {len(prompt):,} characters; the limit is {limit:,} tokens"
            raise ApiError(400, message, name, "context_length_exceeded")
        ids = encode_prompt(self._tokenizer, prompt) if isinstance(prompt, str) else prompt
        if len(ids) > limit:
            message = f"{name} has {len(ids):,} tokens; the limit is {limit:,}"
            raise ApiError(400, message, name, "context_length_exceeded")
        size = self._engine.run.model.vocab_size
        invalid = next((index for index, id_ in enumerate(ids) if not 0 <= id_ < size), None)
        if invalid is not None:
            message = f"{name}[{invalid}] is {ids[invalid]}: the ids of this model are 0 to {size - 1}"
            raise ApiError(400, message, f"{name}[{invalid}]")
        return ids

    def _choice(self, index: int, prompt: str | list[int], ids: list[int], sampling: Sampling) -> Choice:
        request = self.request
        logprobs = request.logprobs is not None or request.token_details
        prompt_logprobs = logprobs and request.echo
        echo = ""
        if request.echo:
            echo = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        engine_request = Request(
            ids,
            request.max_tokens,
            sampling,
            on_chunk=lambda chunk: self._on_chunk(choice, chunk),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            ignore_eos=request.ignore_eos,
        )
        detokenizer = IncrementalDetokenizer(self._tokenizer, request.stops(), len(echo), ids)
        choice = Choice(index, engine_request, detokenizer, echo)
        if prompt_logprobs:
            self._echo_with_logprobs(choice, prompt, ids)
        return choice

    def _echo_with_logprobs(self, choice: Choice, prompt: str | list[int], ids: list[int]) -> None:
        """Make the prompt's tokens part of the text: without stop strings, from the first character on."""
        detokenizer = IncrementalDetokenizer(self._tokenizer)
        if not isinstance(prompt, str):  # else the first id is the <EOS> that encode_prompt adds
            detokenizer.append(ids[:1])
        if len(ids) > 1:
            choice.pending_prompt_tokens = len(ids) - 1
            choice.detokenizer = detokenizer
        else:
            choice.echo_tokens = detokenizer.release(final=True)[1]

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

    def _process(self, choice: Choice, chunk: Chunk) -> tuple[str, list[Token]]:
        """Add a chunk to a choice; returns the text and the tokens that it completes."""
        if choice.pending_prompt_tokens:
            return self._process_prompt(choice, chunk)
        choice.detokenizer.append(chunk.ids, chunk.logprobs)
        choice.generated = choice.detokenizer.count
        if chunk.finish_reason:
            choice.detokenizer.finish()
            choice.finish_reason = chunk.finish_reason
        if choice.detokenizer.stopped:
            choice.finish_reason = "stop"
            choice.request.finish("stop")
        return choice.detokenizer.release(final=bool(choice.finish_reason))

    def _process_prompt(self, choice: Choice, chunk: Chunk) -> tuple[str, list[Token]]:
        """Add prompt tokens with their log-probabilities; the text is released when the prompt is complete."""
        choice.pending_prompt_tokens -= len(chunk.ids)
        choice.detokenizer.append(chunk.ids, chunk.logprobs)
        if choice.pending_prompt_tokens:
            return "", []
        choice.detokenizer.finish()
        text, tokens = choice.detokenizer.release(final=True)
        prompt_ids = choice.request.prompt_ids
        choice.detokenizer = IncrementalDetokenizer(self._tokenizer, self.request.stops(), len(text), prompt_ids)
        if chunk.finish_reason:
            choice.finish_reason = chunk.finish_reason
        return text, tokens

    def usage(self) -> Usage:
        """Return the token counts so far."""
        generated = sum(choice.generated for choice in self.choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
        }

    def _format_choice(self, choice: Choice, text: str, tokens: Sequence[Token]) -> ChoiceBody:
        request = self.request
        finish_reason: Any = choice.finish_reason or None
        result: ChoiceBody = {
            "index": choice.index,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        if request.logprobs is not None:
            result["logprobs"] = format_logprobs(self._tokenizer, tokens, request.logprobs)
        if request.token_details:
            result["details"] = format_details(self._tokenizer, tokens)
        return result

    async def response(self) -> CompletionBody:
        """Return the complete response.

        Raises:
            ApiError: See `deltas`.
        """
        texts = [""] * len(self.choices)
        tokens: list[list[Token]] = [[] for _ in self.choices]
        async for choice, new_text, new_tokens in self.deltas():
            texts[choice.index] += new_text
            tokens[choice.index] += new_tokens
        choices = [self._format_choice(choice, texts[choice.index], tokens[choice.index]) for choice in self.choices]
        return {**self._header, "choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncIterator[str]:
        """Yield the response as server-sent events; an error ends them as the last event."""
        options = self.request.stream_options
        usage: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        deltas = self.deltas()
        try:
            async for choice, text, tokens in deltas:
                yield format_event({**self._header, "choices": [self._format_choice(choice, text, tokens)], **usage})
        except ApiError as error:
            yield format_event(error.body())
            return
        finally:
            await deltas.aclose()
        if usage:
            yield format_event({**self._header, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


def format_event(content: Mapping[str, Any]) -> str:
    """Return a server-sent event with JSON data."""
    return f"data: {json.dumps(content)}\n\n"


def format_logprobs(tokenizer: TextTokenizer, tokens: Sequence[Token], count: int) -> Logprobs:
    """Return log-probabilities in OpenAI's format.

    Args:
        tokenizer: The tokenizer; tokens are identified by their names in its vocabulary, which are unique.
        tokens: The tokens.
        count: Number of most probable tokens to list for each; the token itself is always listed.
    """
    names = tokenizer.id2token
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    for token in tokens:
        if token.logprob is None:  # the first token of a text has no prediction
            token_logprobs.append(None)
            top_logprobs.append(None)
            continue
        top = {names[id_]: value for id_, value in token.logprob.top[:count]}
        token_logprobs.append(token.logprob.logprob)
        top_logprobs.append({**top, names[token.id]: token.logprob.logprob})
    return {
        "tokens": [names[token.id] for token in tokens],
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": [token.offset for token in tokens],
    }


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
