"""POST /v1/completions: turn a request into engine requests, and their chunks into a response or an event stream."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from slm_jax.generation.decode import encode_prompt
from slm_jax.generation.sampling import Sampling
from slm_jax.serve.answers import Answer, Choice, Limits, format_details, format_event
from slm_jax.serve.detokenizer import IncrementalDetokenizer, Token
from slm_jax.serve.engine import Engine
from slm_jax.serve.errors import ApiError
from slm_jax.serve.requests import Chunk, Request
from slm_jax.serve.responses import ChoiceBody, CompletionBody, Logprobs
from slm_jax.serve.schema import CompletionRequest
from slm_jax.utils.text_tokenizer import TextTokenizer


class Completion(Answer):
    """One completion request while it is answered."""

    def __init__(self, name: str, engine: Engine, request: CompletionRequest, limits: Limits):
        """Prepare a completion on the running event loop.

        Args:
            name: Name of the model in the response.
            engine: Its engine.
            request: The validated request.
            limits: Limits of the server.
        """
        super().__init__(engine, limits, "cmpl")
        self.request = request
        self._header: CompletionBody = {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": name,
            "choices": [],
        }

    def encode(self) -> None:
        """Encode the prompts and make the engine's requests.

        Raises:
            ApiError: The request exceeds a limit of the server.
        """
        request = self.request
        self._check_size(request.max_tokens, "max_tokens", len(request.prompts()) * request.n)
        sampling = request.sampling()
        prompts: Sequence[Any] = request.prompts()
        for index, prompt in enumerate(prompts):
            ids = self._encode_prompt(prompt, "prompt" if prompts != request.prompt else f"prompt[{index}]")
            self._prompt_tokens += len(ids)
            for sample in range(request.n):
                choice = self._choice(len(self.choices), prompt, ids, sampling.with_seed_offset(sample))
                self.choices.append(choice)

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

    def _process(self, choice: Choice, chunk: Chunk) -> tuple[str, list[Token]]:
        return self._process_prompt(choice, chunk) if choice.pending_prompt_tokens else super()._process(choice, chunk)

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
        texts, tokens = await self.collect()
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
