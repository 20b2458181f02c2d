"""Schemas of responses, which type checkers compare with the code and the OpenAPI document is generated from."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # as pydantic requires before Python 3.12

# Lists rather than tuples, whose `prefixItems` many tools for OpenAPI do not support.
Candidate = Annotated[list[int | str | float], Field(min_length=3, max_length=3)]
"""A probable token: [id, name, log-probability]."""
TokenRow = Annotated[list[str | int], Field(min_length=4, max_length=4)]
"""A token of a text: [text, kind, id, name]."""
Point = Annotated[list[float], Field(min_length=2, max_length=2)]
"""A point of a curve: [step, value]."""


class Curves(TypedDict):
    """Points of each curve, means of `width` steps."""

    width: int
    loss: list[Point]
    val_loss: list[Point]
    val_bits_per_byte: list[Point]
    lr: list[Point]


class RunBody(TypedDict):
    """A run that the page shows.

    `loaded` is the step of the served model, `saved` that of the newest checkpoint, `step` that of the newest metrics,
    `steps` the planned ones. `held_out` and `tokenizer` are digests: losses of runs with the same can be compared
    if they have the same `objective`.
    """

    id: str
    loaded: int | None
    saved: int | None
    step: int
    steps: int
    report: bool
    held_out: str
    tokenizer: str
    objective: str


class RunsBody(TypedDict):
    """All runs that the page shows."""

    runs: list[RunBody]


class LoadedBody(TypedDict):
    """The step that a model is served at."""

    id: str
    step: int


class Logprobs(TypedDict):
    """Log-probabilities in OpenAI's format; null for the first token of a text, which nothing precedes."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TokenDetail(TypedDict):
    """A token as the page shows it; `top` lists the most probable tokens."""

    id: int
    text: str
    name: str
    kind: str
    logprob: float | None
    top: list[Candidate]


class ChoiceBody(TypedDict):
    """One text; in a stream, its new part."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    details: NotRequired[list[TokenDetail]]


class Usage(TypedDict):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionBody(TypedDict):
    """Response of POST /v1/completions, complete or the data of one event.

    In a stream, `usage` is only there with `stream_options.include_usage`, and null before the last event.
    """

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[ChoiceBody]
    usage: NotRequired[Usage | None]


class TokenBody(TypedDict):
    """A token with its log-probability.

    A token of the answer has the text that it added, and the bytes of this text in UTF-8. Another probable one has its
    name in the vocabulary and its bytes there, null for special tokens and case marks.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TokenBody):
    """A token of an answer, and the most probable ones at its position."""

    top_logprobs: list[TokenBody]


class ChatLogprobs(TypedDict):
    """Log-probabilities of the tokens of an answer."""

    content: list[ChatLogprob]


class AnswerMessage(TypedDict):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    details: NotRequired[list[TokenDetail]]


class AnswerDelta(TypedDict):
    """The new part of an answer; the first one has the role, the last one nothing."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    """The new part of one answer."""

    index: int
    delta: AnswerDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    details: NotRequired[list[TokenDetail]]


class PromptDetails(TypedDict):
    """Number of tokens of the conversation that were not computed again."""

    cached_tokens: int


class ChatUsage(Usage):
    """Token counts of a chat request."""

    prompt_tokens_details: PromptDetails


class ChatCompletionBody(TypedDict):
    """Response of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage


class ChatChunk(TypedDict):
    """Data of one event of a streamed chat response.

    `usage` is only there with `stream_options.include_usage`, and null before the last event.
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[ChatUsage | None]


class ModelBody(TypedDict):
    """A run that is served.

    `chat` says whether POST /v1/chat/completions works, that is whether the tokenizer has a chat template, and
    `chat_trained` whether the run was trained on conversations.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    step: int
    parameters: int
    context: int
    vocab_size: int
    max_prompt_tokens: int
    max_tokens: int
    chat: bool
    chat_trained: bool


class ModelList(TypedDict):
    """All runs that are served."""

    object: Literal["list"]
    data: list[ModelBody]


class WarmUpProgress(TypedDict):
    """Number of warm-up requests that are done, and of all."""

    done: int
    total: int


class Health(TypedDict):
    """State of the server: `failed` names engines, `starting` has those that are compiling."""

    status: Literal["ok", "starting", "failed"]
    failed: list[str]
    starting: NotRequired[dict[str, WarmUpProgress]]


class VocabularyBody(TypedDict):
    """Size of a vocabulary, and number of its entries of each kind."""

    size: int
    kinds: dict[str, int]


class TokensBody(TypedDict):
    """Tokens of a text, and its length."""

    tokens: list[TokenRow]
    bytes: int
    characters: int


class TokenTree(TypedDict):
    """A token and what it is made of; the id is null for a text that is not one token."""

    id: int | None
    name: str | None
    kind: str
    text: str
    bytes: str
    parts: list["TokenTree"]
