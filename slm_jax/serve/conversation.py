"""A conversation as the prompt of an engine, and what a run knows about conversations."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.chat.messages import Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer
from tokenizer import HybridTokenizer


class ChatPrompt(NamedTuple):
    """An encoded conversation.

    Attributes:
        ids: Its ids.
        boundaries: Positions where the prefix cache may cut it: after the system message, and before and after each
            response.
    """

    ids: list[int]
    boundaries: list[int]


def encode_chat(template: ChatTemplate, messages: Sequence[Message], generation_prompt: bool = True) -> ChatPrompt:
    """Encode a conversation.

    Args:
        template: The chat template.
        messages: The conversation.
        generation_prompt: Append the beginning of a response.

    Raises:
        UserError: The template does not accept these messages.
    """
    encoded = template.encode(messages, generation_prompt)
    ids, predicted = encoded.ids, encoded.predicted
    if not predicted.any() and any(message.role == "assistant" for message in messages):
        # Templates of published models mark no response before a generation prompt; some hide where responses are.
        with contextlib.suppress(UserError):
            earlier = template.encode(messages[: _last_response(messages) + 1])
            length = _common_prefix(earlier.ids, ids)
            predicted = np.append(earlier.predicted[:length], np.zeros(len(ids) - length, bool))
    boundaries = set((np.flatnonzero(np.diff(predicted)) + 1).tolist())
    if messages[0].role in ("system", "developer") and len(messages) > 1:
        boundaries.add(_after_system(template, messages[0], ids))
    return ChatPrompt(ids.tolist(), sorted(boundaries - {0, len(ids)}))


def _last_response(messages: Sequence[Message]) -> int:
    return max(index for index, message in enumerate(messages) if message.role == "assistant")


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(np.argmax(differs)) if differs.any() else length


def _after_system(template: ChatTemplate, system: Message, ids: np.ndarray) -> int:
    """Return the number of ids that do not depend on the messages after the system message; 0 if it is not known."""
    try:
        return _common_prefix(template.encode([system, Message("user", "")]).ids, ids)
    except UserError:  # a template that accepts no empty message
        return 0


def find_template(tokenizer: TextTokenizer) -> tuple[ChatTemplate | None, str]:
    """Return the chat template of a tokenizer, or None and the reason why there is none."""
    try:
        return ChatTemplate.of(tokenizer), ""
    except UserError as error:
        return None, str(error)


def chat_masks(tokenizer: TextTokenizer, template: ChatTemplate) -> tuple[list[int], list[int]]:
    """Return the ids that a response never contains, and those that end it.

    Special tokens are suppressed, those of other roles among them, except those that end a response.
    """
    stops = list(template.stop_ids)
    suppressed = set(tokenizer.suppressed_ids)
    if not isinstance(tokenizer, HybridTokenizer):  # whose case marks have no bytes either
        suppressed |= {id_ for id_, data in enumerate(tokenizer.token_bytes) if not data}
    return sorted(suppressed - set(stops)), stops
