"""POST /v1/completions: requests to texts of an engine, what the engine hands out to answers, whole or as a stream."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from slm_jax.generation.decode import encode_prompt
from slm_jax.generation.sampling import Sampling
from slm_jax.serve.detokenizer import Token, Written
from slm_jax.serve.engine import Engine, Full, Piece, Text
from slm_jax.serve.schema import ApiError, CompletionRequest
from tokenizer import HybridTokenizer
from tokenizer.inspect.playground import kind_of


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    prompt_tokens: int
    max_tokens: int
    seconds: float


@dataclass
class Choice:
    """One text of an answer as it grows."""

    index: int
    job: Text
    written: Written
    echo: str
    echo_tokens: list[Token] = field(default_factory=list)  # where the engine tells nothing of the prompt
    ended: str = ""  # stop, length, or the engine's own cancelled and error
    drawn: int = 0
    prompt_places: int = 0  # of the prompt's, which come first, still to come


class Completion:
    """One request being answered."""

    def __init__(self, name: str, engine: Engine, request: CompletionRequest, limits: Limits):
        """To be followed by `encode` (in any thread), `submit`, and `answer` or `events`."""
        self.request, self._engine, self._limits = request, engine, limits
        self._tokenizer = engine.run.tokenizer
        self._loop = asyncio.get_running_loop()
        self._arrivals: asyncio.Queue[tuple[Choice, Piece]] = asyncio.Queue()
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self._head["model"] = name
        self.choices: list[Choice] = []
        self._prompt_tokens = 0

    def encode(self) -> None:
        """Make ids of the prompts. Raises ApiError for what is beyond the limits."""
        request, limit = self.request, self._limits.max_tokens
        if request.max_tokens > limit:
            raise ApiError(400, f"max_tokens {request.max_tokens:,} is above {limit:,}", "max_tokens")
        most = self._engine.slots + self._engine.waiting
        if (count := len(request.prompts()) * request.n) > most:
            raise ApiError(400, f"{count:,} texts in one request are too many: {most} are the most", "n")
        sampling = request.sampling()
        for prompt in request.prompts():
            ids = self._encode(prompt)
            self._prompt_tokens += len(ids)
            for sample in range(request.n):
                self.choices.append(self._choice(len(self.choices), prompt, ids, sampling.with_seed_plus(sample)))

    def _encode(self, prompt: str | list[int]) -> list[int]:
        limit = self._limits.prompt_tokens
        # A token is 96 characters at most: what is longer by that measure need not be encoded to be refused.
        if isinstance(prompt, str) and len(prompt) > 96 * limit:
            raise ApiError(400, f"a prompt has {len(prompt):,} characters; {limit:,} tokens are the most", "prompt")
        ids = encode_prompt(self._tokenizer, prompt) if isinstance(prompt, str) else prompt
        if len(ids) > limit:
            raise ApiError(
                400, f"a prompt has {len(ids):,} tokens; {limit:,} are the most", "prompt", "context_length_exceeded"
            )
        size = self._engine.run.model.vocab_size
        if outside := [id_ for id_ in ids if not 0 <= id_ < size][:3]:
            raise ApiError(400, f"ids {outside} are outside the vocabulary of {size}", "prompt")
        return ids

    def _choice(self, index: int, prompt: str | list[int], ids: list[int], sampling: Sampling) -> Choice:
        request = self.request
        told = request.logprobs is not None or request.token_details
        echo = "" if not request.echo else prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        job = Text(
            ids, request.max_tokens, sampling, lambda piece: self._arrive(choice, piece), told,
            told and request.echo, request.ignore_eos,
        )  # fmt: skip
        choice = Choice(index, job, Written(self._tokenizer, request.stops(), len(echo)), echo)
        if job.prompt_told:
            # The prompt's own tokens are told like drawn ones: without stops, from the first character on.
            written = Written(self._tokenizer)
            if not isinstance(prompt, str):
                written.push(ids[:1])
            if len(ids) > 1:
                choice.prompt_places, choice.written = len(ids) - 1, written
            else:
                choice.echo_tokens = written.take(whole=True)[1]
        return choice

    def _arrive(self, choice: Choice, piece: Piece) -> None:
        """From the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._arrivals.put_nowait, (choice, piece))
        except RuntimeError:  # the server has ended
            choice.job.leave = "cancelled"

    def submit(self) -> None:
        """Hand the texts to the engine. Raises ApiError when too many wait."""
        most = self._engine.slots + self._engine.waiting
        try:
            self._engine.submit([choice.job for choice in self.choices])
        except Full:
            raise ApiError(
                429, f"the server is busy: {most} texts are being written or wait. Try again later", code="busy"
            ) from None

    def cancel(self) -> None:
        """Free what is still being written."""
        for choice in self.choices:
            choice.job.leave = choice.job.leave or "cancelled"

    async def parts(self) -> AsyncIterator[tuple[Choice, str, list[Token]]]:
        """(choice, new text, its tokens) as they come; after a choice's last part its `ended` is set.

        Raises ApiError when the time is over or the engine fails. Cancels what is unfinished when it is left.
        """
        try:
            async with asyncio.timeout(self._limits.seconds):
                for choice in self.choices:
                    if (choice.echo or choice.echo_tokens) and not choice.prompt_places:
                        yield choice, choice.echo, choice.echo_tokens
                while not all(choice.ended for choice in self.choices):
                    choice, piece = await self._arrivals.get()
                    if choice.ended:
                        continue
                    text, tokens = self._take(choice, piece)
                    if choice.ended in ("cancelled", "error"):
                        raise ApiError(503, "the server stopped before the text was whole")
                    if text or tokens or choice.ended:
                        yield choice, text, tokens
        except TimeoutError:
            raise ApiError(504, f"not done within {self._limits.seconds:g} s", code="timeout") from None
        finally:
            self.cancel()

    def _take(self, choice: Choice, piece: Piece) -> tuple[str, list[Token]]:
        if choice.prompt_places:
            choice.prompt_places -= len(piece.ids)
            choice.written.push(piece.ids, piece.places)
            if choice.prompt_places:
                return "", []
            choice.written.finish()
            text, tokens = choice.written.take(whole=True)
            choice.written = Written(self._tokenizer, self.request.stops(), len(text))
            if piece.end:
                choice.ended = piece.end
            return text, tokens
        choice.drawn += len(piece.ids)
        choice.written.push(piece.ids, piece.places)
        if piece.end:
            choice.written.finish()
            choice.ended = piece.end
        if choice.written.stopped:
            choice.ended = choice.job.leave = "stop"
        return choice.written.take(whole=bool(choice.ended))

    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        drawn = sum(choice.drawn for choice in self.choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self._prompt_tokens + drawn,
        }

    def _form(self, choice: Choice, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        request = self.request
        form: dict[str, Any] = {"index": choice.index, "text": text, "logprobs": None}
        form["finish_reason"] = choice.ended or None
        if request.logprobs is not None:
            form["logprobs"] = logprobs(self._tokenizer, tokens, request.logprobs)
        if request.token_details:
            form["details"] = details(self._tokenizer, tokens)
        return form

    async def answer(self) -> dict[str, Any]:
        """The whole answer."""
        texts = [""] * len(self.choices)
        tokens: list[list[Token]] = [[] for _ in self.choices]
        async for choice, text, new in self.parts():
            texts[choice.index] += text
            tokens[choice.index] += new
        forms = [self._form(choice, texts[choice.index], tokens[choice.index]) for choice in self.choices]
        return {**self._head, "choices": forms, "usage": self.usage()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events; an error on the way is the last of them."""
        options = self.request.stream_options
        usage: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        parts = self.parts()
        try:
            async for choice, text, tokens in parts:
                yield _event({**self._head, "choices": [self._form(choice, text, tokens)], **usage})
        except ApiError as error:
            yield _event(error.body())
            return
        finally:
            await parts.aclose()  # type: ignore[attr-defined]
        if usage:
            yield _event({**self._head, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


def _event(tree: dict[str, Any]) -> str:
    return f"data: {json.dumps(tree)}\n\n"


def logprobs(tokenizer: HybridTokenizer, tokens: Sequence[Token], count: int) -> dict[str, Any]:
    """The OpenAI form; tokens go by their names in the vocabulary, which are unique."""
    names = tokenizer.id2token
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        if token.place is None:
            tops.append(None)
            continue
        top = {names[id_]: value for id_, value in token.place.top[:count]}
        tops.append({**top, names[token.id]: token.place.logprob})
    return {
        "tokens": [names[token.id] for token in tokens],
        "token_logprobs": [token.place and token.place.logprob for token in tokens],
        "top_logprobs": tops,
        "text_offset": [token.offset for token in tokens],
    }


def details(tokenizer: HybridTokenizer, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Each token as the page shows it."""
    names = tokenizer.id2token
    return [
        {
            "id": token.id,
            "text": token.text,
            "name": names[token.id],
            "kind": kind_of(tokenizer, token.id),
            "logprob": token.place and token.place.logprob,
            "top": [[id_, names[id_], value] for id_, value in token.place.top] if token.place else [],
        }
        for token in tokens
    ]
