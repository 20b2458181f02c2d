"""Schemas of requests: parameters, their types, bounds and defaults."""

import secrets
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

from slm_jax.generation.sampling import Sampling
from slm_jax.serve.errors import ApiError
from slm_jax.serve.validation import Body, Query
from tokenizer.inspect.playground import MAX_TEXT_CHARACTERS


class StreamOptions(Body):
    """Options of a streamed response."""

    include_usage: bool = False
    include_obfuscation: bool = False


Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=256, fail_fast=True)]
IdLists = Annotated[list[Ids], Field(min_length=1, max_length=256, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class GenerationRequest(Body):
    """Parameters of every request that generates text.

    Parameters of OpenAI's API that are not supported are accepted with their default value only.
    """

    unsupported: ClassVar[dict[str, str]] = {
        "presence_penalty": "leave it out (repetition_penalty is supported)",
        "frequency_penalty": "leave it out (repetition_penalty is supported)",
        "logit_bias": "leave it out",
    }
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    user: str | None = None
    # Extensions of OpenAI's API that other servers have too.
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    ignore_eos: bool = False
    token_details: bool = False
    """Add `details` to each choice: id, kind, text and most probable alternatives of every token."""
    # Not supported.
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def sampling(self) -> Sampling:
        """Return the sampling settings, with a random seed if the request has none."""
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
        )

    def stops(self) -> list[str]:
        """Return the stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions.

    Parameters of OpenAI's API that are not supported are accepted with their default value only.
    """

    unsupported: ClassVar[dict[str, str]] = {
        **GenerationRequest.unsupported,
        "suffix": "leave it out",
        "best_of": "leave it out, or set it to n",
    }
    foreign: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("messages", "tools", "tool_choice", "functions", "function_call", "response_format", "modalities"),
            "send a prompt, or use POST /v1/chat/completions",
        ),
        "max_completion_tokens": "use max_tokens",
        "max_new_tokens": "use max_tokens",
        "max_length": "use max_tokens",
        "top_logprobs": "use logprobs, the number of alternatives",
        "num_return_sequences": "use n",
        "inputs": "use prompt",
        "typical_p": "use top_p or min_p",
        "do_sample": "use temperature 0 for the most probable tokens",
    }

    prompt: str | Ids | Texts | IdLists = ""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False
    # Not supported.
    best_of: int | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Parse a JSON body.

        Raises:
            ApiError: The body is invalid; the message names all problems.
        """
        request = super().parse(body)
        if request.best_of not in (None, request.n):
            text = (
                f"best_of {request.best_of} is not supported, a parameter of OpenAI's API: {cls.unsupported['best_of']}"
            )
            raise ApiError(400, text, "best_of")
        if request.max_tokens == 0 and not request.echo:
            raise ApiError(400, "max_tokens 0 needs echo, else the response is empty", "max_tokens")
        return request

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts: texts, or lists of ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class CutRequest(Body):
    """Body of POST /api/cut."""

    vocabulary: str
    # The maximum is checked by the playground: pydantic's would refuse lone surrogates.
    text: Annotated[str, Field(json_schema_extra={"maxLength": MAX_TEXT_CHARACTERS})]


class VocabularyQuery(Query):
    """Parameters of GET /api/describe."""

    vocabulary: str


class ExplainQuery(VocabularyQuery):
    """Parameters of GET /api/explain."""

    id: Annotated[int, Field(ge=0, lt=10**9)]


class HealthQuery(Query):
    """Parameters of GET /health."""

    code: Annotated[int, Field(ge=200, le=200)] | None = None


class CurveQuery(Query):
    """Parameters of GET /api/curve."""

    run: str | None = None
    width: Annotated[int, Field(ge=0, le=10**9)] = 0


class ReportQuery(Query):
    """Parameters of GET /api/report."""

    run: str


class LoadRequest(Body):
    """Body of POST /api/load."""

    run: str
    replace: str | None = None
