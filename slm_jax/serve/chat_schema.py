"""Schema of POST /v1/chat/completions, and what of OpenAI's API a language model of text cannot do."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field

from slm_jax.chat.messages import Message
from slm_jax.serve.errors import ApiError
from slm_jax.serve.schema import GenerationRequest
from slm_jax.serve.validation import Body, parse_json

MAX_MESSAGES = 1000
_ROLES = ("system", "developer", "user", "assistant")
_TEXT_ONLY = "these models read and write text only"
_UNSUPPORTED_ROLES = {"tool": "these models call no tools", "function": "these models call no functions"}
_UNSUPPORTED_FIELDS = {
    "tool_calls": "these models call no tools",
    "tool_call_id": "these models call no tools",
    "function_call": "these models call no functions",
    "audio": _TEXT_ONLY,
    "name": "the chat template has no names, write it in the content",
    "annotations": "leave it out",
}


def _check_false(value: bool) -> bool:
    if value:
        raise ValueError("only false is supported")
    return value


# Not `Literal[False]`, which accepts 0.
False_ = Annotated[bool, AfterValidator(_check_false), Field(json_schema_extra={"const": False})]


class TextPart(Body):
    """A part of a content: text only."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1000, fail_fast=True)]
    refusal: Annotated[str, Field(max_length=0)] | None = None
    """As in responses, which clients send back: null."""

    def message(self) -> Message:
        """Return the message with the parts of its content joined."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(self.role, content)


class TextFormat(Body):
    """Format of the response: text only."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions.

    Parameters of OpenAI's API that are not supported are accepted with their default value only. These have no effect:
    user, metadata, prompt_cache_key, safety_identifier.
    """

    unsupported: ClassVar[dict[str, str]] = {
        **GenerationRequest.unsupported,
        "tools": "these models call no tools",
        "tool_choice": "these models call no tools",
        "functions": "these models call no functions",
        "function_call": "these models call no functions",
        "response_format": 'only {"type": "text"} is',
        "modalities": f"{_TEXT_ONLY}",
        "store": "nothing is stored",
        "service_tier": "there is one tier",
    }
    foreign: ClassVar[dict[str, str]] = {
        "audio": _TEXT_ONLY,
        "prediction": "leave it out",
        "reasoning_effort": "leave it out",
        "verbosity": "leave it out",
        "web_search_options": "these models search nothing",
        "prompt": "send messages, or use POST /v1/completions",
        "echo": "use POST /v1/completions",
        "suffix": "use POST /v1/completions",
        "best_of": "use n",
        "max_new_tokens": "use max_completion_tokens",
        "max_length": "use max_completion_tokens",
        "num_return_sequences": "use n",
        "input": "use messages",
        "typical_p": "use top_p or min_p",
        "do_sample": "use temperature 0 for the most probable tokens",
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    parallel_tool_calls: bool | None = None
    # Not supported.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    store: False_ | None = None
    service_tier: Literal["auto", "default"] | None = None

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Parse a JSON body.

        Raises:
            ApiError: The body is invalid; the message names all problems.
        """
        tree = parse_json(body)
        _check_messages(tree.get("messages"))
        request = cls._validate(tree)
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, f"top_logprobs {request.top_logprobs} needs logprobs true", "top_logprobs")
        if None not in (request.max_tokens, limit := request.max_completion_tokens) and request.max_tokens != limit:
            text = f"max_tokens {request.max_tokens} and max_completion_tokens {limit} differ: send one of them"
            raise ApiError(400, text, "max_tokens")
        return request

    def limit(self) -> tuple[int | None, str]:
        """Return the maximum number of tokens of a response, None without one, and the name of the parameter."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"


def _check_messages(messages: Any) -> None:
    """Refuse what messages of OpenAI's API can have besides text, and drop the fields of it that are empty.

    Raises:
        ApiError: A message has a tool call, an image, audio, a name or the like; its path is the parameter.
    """
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, dict):
            continue
        path = f"messages[{index}]"
        role = message.get("role")
        if isinstance(role, str) and role in _UNSUPPORTED_ROLES:
            _refuse(f"{path}.role", f'"{role}"', _UNSUPPORTED_ROLES[role])
        for name, reason in _UNSUPPORTED_FIELDS.items():
            if message.pop(name, None):
                _refuse(f"{path}.{name}", "", reason)
        parts = message.get("content")
        for number, part in enumerate(parts if isinstance(parts, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else "text"
            if isinstance(kind, str) and kind != "text":
                _refuse(f"{path}.content[{number}].type", f'"{kind[:60]}"', _TEXT_ONLY)


def _refuse(path: str, value: str, reason: str) -> None:
    shown = f"{path} {value}".rstrip().encode("utf-8", "backslashreplace").decode()
    raise ApiError(400, f"{shown} is not supported, a part of OpenAI's API: {reason}", path, "unsupported_value")
