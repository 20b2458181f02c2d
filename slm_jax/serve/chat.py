"""POST /v1/chat/completions: turn a conversation into engine requests, and their chunks into a response or events."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from slm_jax.chat.messages import Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.generation.sampling import Sampling
from slm_jax.serve.answers import Answer, Choice, Limits, format_details, format_event
from slm_jax.serve.chat_schema import ChatRequest
from slm_jax.serve.conversation import ChatPrompt, encode_chat
from slm_jax.serve.detokenizer import IncrementalDetokenizer, Token
from slm_jax.serve.engine import Engine
from slm_jax.serve.errors import ApiError
from slm_jax.serve.requests import Request
from slm_jax.serve.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletionBody,
    ChatLogprob,
    ChatLogprobs,
    ChatUsage,
    TokenBody,
)
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer

_following: set[asyncio.Task[None]] = set()  # keeps tasks alive


class ChatCompletion(Answer):
    """One chat request while it is answered."""

    def __init__(self, name: str, engine: Engine, request: ChatRequest, limits: Limits):
        """Prepare a response on the running event loop.

        Args:
            name: Name of the model in the response.
            engine: Its engine.
            request: The validated request.
            limits: Limits of the server.

        Raises:
            ApiError: The tokenizer of the model has no chat template.
        """
        super().__init__(engine, limits, "chatcmpl")
        if engine.chat_template is None:
            message = f"model {name!r} cannot chat: {engine.no_chat_reason}; POST /v1/completions continues texts"
            raise ApiError(400, message, "model", "no_chat_template")
        self.request = request
        self._template: ChatTemplate = engine.chat_template
        self._messages = [message.message() for message in request.messages]
        self._header: dict[str, Any] = {"id": self._id, "created": self._created, "model": name}

    @property
    def characters(self) -> int:
        """Number of characters of the conversation."""
        return sum(len(message.content) for message in self._messages)

    def encode(self) -> None:
        """Encode the conversation and make the engine's requests.

        Raises:
            ApiError: The request exceeds a limit of the server or the context, or the order of roles is invalid.
        """
        request = self.request
        limit, name = request.limit()
        self._check_size(limit or 1, name, request.n)
        # The answer needs room for one token at least.
        longest = min(self._limits.prompt_tokens, self._engine.context - 1)
        if self.characters > self._engine.longest_token * longest:
            raise self._too_long(f"{self.characters:,} characters")
        prompt = self._encode(self._messages)
        if len(prompt.ids) > longest:
            raise self._too_long(f"{len(prompt.ids):,} tokens")
        self._prompt_tokens = len(prompt.ids)
        rest = self._engine.context - len(prompt.ids)
        max_tokens = min(rest, self._limits.max_tokens if limit is None else limit)
        sampling = request.sampling()
        for sample in range(request.n):
            self.choices.append(self._choice(prompt, max_tokens, sampling.with_seed_offset(sample)))

    def _encode(self, messages: Sequence[Message]) -> ChatPrompt:
        try:
            return encode_chat(self._template, messages)
        except UserError as error:
            raise ApiError(400, f"messages: {error}", "messages") from None

    def _too_long(self, size: str) -> ApiError:
        limit, context = self._limits.prompt_tokens, self._engine.context
        if limit < context:
            bound = f"{limit:,} tokens, which this server accepts as a prompt (--max_prompt)"
        else:
            bound = f"{context - 1:,} tokens, so that an answer fits into the context of {context:,}"
        message = (
            f"the conversation has {size}; the limit is {bound}: leave out its oldest turns, nothing is cut off "
            "without notice"
        )
        return ApiError(400, message, "messages", "context_length_exceeded")

    def _choice(self, prompt: ChatPrompt, max_tokens: int, sampling: Sampling) -> Choice:
        request = Request(
            prompt.ids,
            max_tokens,
            sampling,
            on_chunk=lambda chunk: self._on_chunk(choice, chunk),
            logprobs=self.request.logprobs or self.request.token_details,
            ignore_eos=self.request.ignore_eos,
            boundaries=prompt.boundaries,
        )
        detokenizer = IncrementalDetokenizer(self._tokenizer, self.request.stops(), 0, prompt.ids)
        choice = Choice(len(self.choices), request, detokenizer, "")
        return choice

    def follow_up(self, text: str, run: Callable[..., Awaitable[Any]]) -> None:
        """Have the engine compute the answered conversation while it is idle: the next turn repeats it.

        Args:
            text: The answer.
            run: Runs a function in a thread; it may refuse to.
        """
        if self.request.n > 1 or not self._engine.prefixes.max_bytes:
            return

        def compute() -> None:
            answered = encode_chat(self._template, [*self._messages, Message("assistant", text)], False)
            self._engine.compute_ahead(*answered)

        async def follow() -> None:
            # If the server is busy, or the template refuses the answer, the next turn is computed in full.
            with contextlib.suppress(ApiError, UserError):
                await run(compute)

        task = asyncio.ensure_future(follow())
        _following.add(task)
        task.add_done_callback(_following.discard)

    def chat_usage(self) -> ChatUsage:
        """Return the token counts, including those that the prefix cache saved."""
        return {**self.usage(), "prompt_tokens_details": {"cached_tokens": self.choices[0].request.reused}}

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        return {"content": format_chat_logprobs(self._tokenizer, tokens, self.request.top_logprobs or 0)}

    async def response(self, on_text: Callable[[str], None]) -> ChatCompletionBody:
        """Return the complete response.

        Args:
            on_text: Called with the text of the first choice when it is complete.

        Raises:
            ApiError: See `deltas`.
        """
        texts, tokens = await self.collect()
        on_text(texts[0])
        choices: list[ChatChoice] = []
        for choice in self.choices:
            finish_reason: Any = choice.finish_reason
            body: ChatChoice = {
                "index": choice.index,
                "message": {"role": "assistant", "content": texts[choice.index], "refusal": None},
                "logprobs": self._logprobs(tokens[choice.index]),
                "finish_reason": finish_reason,
            }
            if self.request.token_details:
                body["details"] = format_details(self._tokenizer, tokens[choice.index])
            choices.append(body)
        return {**self._header, "object": "chat.completion", "choices": choices, "usage": self.chat_usage()}  # type: ignore[typeddict-item]

    async def events(self, on_text: Callable[[str], None]) -> AsyncIterator[str]:
        """Yield the response as server-sent events; an error ends them as the last event.

        Args:
            on_text: Called with the text of the first choice when it is complete.
        """
        options = self.request.stream_options
        usage: dict[str, Any] = {"usage": None} if options and options.include_usage else {}

        def event(choices: list[ChatChunkChoice], **more: Any) -> str:
            chunk: ChatChunk = {**self._header, "object": "chat.completion.chunk", "choices": choices}  # type: ignore[typeddict-item]
            return format_event({**chunk, **usage, **more})

        deltas = self.deltas()
        first = ""
        try:
            for choice in self.choices:
                yield event([_delta(choice, {"role": "assistant", "content": ""})])
            async for choice, text, tokens in deltas:
                first += text if choice.index == 0 else ""
                if text or tokens:
                    body = _delta(choice, {"content": text}, self._logprobs(tokens))
                    if self.request.token_details:
                        body["details"] = format_details(self._tokenizer, tokens)
                    yield event([body])
                if choice.finish_reason:
                    yield event([_delta(choice, {}, finish_reason=choice.finish_reason)])
        except ApiError as error:
            yield format_event(error.body())
            return
        finally:
            await deltas.aclose()
        on_text(first)
        if usage:
            yield event([], usage=self.chat_usage())
        yield "data: [DONE]\n\n"


def _delta(
    choice: Choice, delta: Any, logprobs: ChatLogprobs | None = None, finish_reason: Any = None
) -> ChatChunkChoice:
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def format_chat_logprobs(tokenizer: TextTokenizer, tokens: Sequence[Token], count: int) -> list[ChatLogprob]:
    """Return log-probabilities in the format of OpenAI's chat API.

    The tokens of the answer, joined, are its text: a case mark is an empty text and changes the token after it, and a
    character of several tokens is the text of the last of them. What another token would have become in this place is
    not known: the most probable ones have their names in the vocabulary and the bytes there.

    Args:
        tokenizer: The tokenizer.
        tokens: The tokens of an answer, with log-probabilities.
        count: Number of most probable tokens to list for each.
    """

    def other(id_: int, logprob: float) -> TokenBody:
        data = tokenizer.token_bytes[id_]
        return {"token": tokenizer.id2token[id_], "logprob": logprob, "bytes": list(data) if data else None}

    result: list[ChatLogprob] = []
    for each in tokens:
        if each.logprob is not None:
            data = list(each.text.encode("utf-8", "surrogatepass"))
            body: TokenBody = {"token": each.text, "logprob": each.logprob.logprob, "bytes": data}
            top = [body if id_ == each.id else other(id_, value) for id_, value in each.logprob.top[:count]]
            result.append({**body, "top_logprobs": top})
    return result
