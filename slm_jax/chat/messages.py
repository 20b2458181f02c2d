"""Messages of a conversation, independent of how a tokenizer encodes them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.utils.errors import UserError

ROLES = ("system", "user", "assistant")
ROLE_ALIASES = {"developer": "system"}
"""Other names of roles: the OpenAI API renamed "system" for newer models."""


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant"; "developer" is read as "system".
        content: The text, any str.
    """

    role: str
    content: str


class EncodedChat(NamedTuple):
    """The token ids of a conversation.

    Attributes:
        ids: int32 [T], the complete sequence, beginning with the id that begins a text; `apply_chat_template` of
            transformers gives the same.
        predicted: bool [T], True at the tokens of assistant turns, the token that ends each of them included.
    """

    ids: np.ndarray
    predicted: np.ndarray


def normalized(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the standard name of each role.

    Raises:
        UserError: There are no messages, or a role is unknown.
    """
    if not messages:
        raise UserError("the conversation is empty: it needs at least one message")
    result = []
    for number, message in enumerate(messages, start=1):
        role = ROLE_ALIASES.get(message.role, message.role)
        if role not in ROLES:
            raise UserError(f"message {number} has the role {message.role!r}: the roles are {', '.join(ROLES)}")
        result.append(Message(role, message.content))
    return result


def check_order(messages: Sequence[Message], generation_prompt: bool) -> None:
    """Check the order of roles: at most one system message, first; then user and assistant in turn.

    Args:
        messages: Messages with the standard names of roles.
        generation_prompt: Whether the next turn is the assistant's, so that the last message must not be.

    Raises:
        UserError: The order is another one.
    """
    skipped = 1 if messages[0].role == "system" else 0
    for position, message in enumerate(messages[skipped:]):
        expected = "assistant" if position % 2 else "user"
        if message.role != expected:
            number = position + skipped + 1
            raise UserError(
                f"message {number} has the role {message.role!r}, expected {expected!r}: an optional system message "
                "is first, then user and assistant take turns"
            )
    if len(messages) == skipped:
        raise UserError("the conversation has a system message only: it needs a message of the user")
    if generation_prompt and messages[-1].role == "assistant":
        raise UserError("the last message is the assistant's: a response needs a message of the user before it")
