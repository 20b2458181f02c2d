"""What a completion request may say, and errors in the form that clients of the OpenAI API expect."""

import secrets
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator

from slm_jax.generation.sampling import Sampling


class ApiError(Exception):
    """An answer other than the one asked for."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The OpenAI form."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


Ids = Annotated[list[int], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions; what is not supported may only be given as what it means to leave it out."""

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
    # Beyond OpenAI's, as other servers have them.
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    ignore_eos: bool = False
    token_details: bool = False
    """Each choice also has `details`: every token's id, kind, text and most probable rivals."""
    # Not supported.
    best_of: int | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, tree: Any) -> Any:
        """Clients write null for what they leave out."""
        if not isinstance(tree, dict):
            return tree
        return {name: value for name, value in tree.items() if value is not None or name not in cls.model_fields}

    @classmethod
    def parse(cls, body: bytes) -> "CompletionRequest":
        """A request out of JSON. Raises ApiError that names all that is wrong."""
        try:
            request = cls.model_validate_json(body)
        except pydantic.ValidationError as error:
            raise _explained(error) from None
        if request.best_of not in (None, request.n):
            raise ApiError(400, f"best_of {request.best_of} is not supported: leave it out, or give n", "best_of")
        if request.max_tokens == 0 and not request.echo:
            raise ApiError(400, "max_tokens 0 needs echo, else there is nothing to answer", "max_tokens")
        return request

    def sampling(self) -> Sampling:
        """How tokens are drawn; without a seed, by a random one."""
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, 0, seed)

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt: a text, or ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


_ONE_OF = {
    "prompt": "a text, a list of texts, a list of ids, or a list of lists of ids; at most 256, none without an id",
    "stop": "a text or a list of at most 16, each of 1 to 200 characters",
}


def _explained(error: pydantic.ValidationError) -> ApiError:
    """The problems in one line; those of one field's alternatives count once."""
    found: dict[str, str] = {}
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        name = str(each["loc"][0]) if each["loc"] else ""
        if each["type"] == "extra_forbidden":
            found[name] = f"unknown parameter {name!r}"
        elif each["type"] == "json_invalid":
            found[name] = f"the body is no JSON ({each['msg']})"
        else:
            found.setdefault(name, f"{name}: {each['msg']}" if name else each["msg"])
    found.update({name: f"{name}: should be {text}" for name, text in _ONE_OF.items() if name in found})
    return ApiError(400, "; ".join(found.values()), next(iter(found)) or None)
