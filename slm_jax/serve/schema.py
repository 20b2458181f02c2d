"""Schema of completion requests, and errors in the format that clients of the OpenAI API expect."""

import secrets
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator

from slm_jax.generation.sampling import Sampling


class ApiError(Exception):
    """An error response.

    Attributes:
        status: HTTP status.
        message: Cause and remedy.
        param: Name of the parameter at fault, if any.
        code: Machine-readable code, if any.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's format."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


Ids = Annotated[list[int], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class CompletionRequest(BaseModel):
    """Body of POST /v1/completions.

    Parameters of OpenAI's API that are not supported are accepted with their default value only.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=256)] = ""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False
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
    best_of: int | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, tree: Any) -> Any:
        """Drop nulls: clients write them for parameters they leave out."""
        if not isinstance(tree, dict):
            return tree
        return {name: value for name, value in tree.items() if value is not None or name not in cls.model_fields}

    @classmethod
    def parse(cls, body: bytes) -> "CompletionRequest":
        """Parse a JSON body.

        Raises:
            ApiError: The body is invalid; the message names all problems.
        """
        try:
            request = cls.model_validate_json(body)
        except pydantic.ValidationError as error:
            raise _to_api_error(error) from None
        if request.best_of not in (None, request.n):
            raise ApiError(400, f"best_of {request.best_of} is not supported: omit it, or set it to n", "best_of")
        if request.max_tokens == 0 and not request.echo:
            raise ApiError(400, "max_tokens 0 needs echo, else the response is empty", "max_tokens")
        return request

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

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts: texts, or lists of ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


_ALTERNATIVES = {
    "prompt": "a text, a list of texts, a list of ids, or a list of lists of ids; at most 256, none empty",
    "stop": "a text or a list of at most 16, each of 1 to 200 characters",
}


def _to_api_error(error: pydantic.ValidationError) -> ApiError:
    """Return all problems in one line; those of the alternative types of one field are merged."""
    problems: dict[str, str] = {}
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        name = str(each["loc"][0]) if each["loc"] else ""
        if each["type"] == "extra_forbidden":
            problems[name] = f"unknown parameter {name!r}"
        elif each["type"] == "json_invalid":
            problems[name] = f"the body is not valid JSON ({each['msg']})"
        else:
            problems.setdefault(name, f"{name}: {each['msg']}" if name else each["msg"])
    problems.update({name: f"{name}: should be {text}" for name, text in _ALTERNATIVES.items() if name in problems})
    return ApiError(400, "; ".join(problems.values()), next(iter(problems)) or None)
