"""Rows of preference data: a prompt with a chosen and a rejected response.

{"chosen": [{"role": "user", …}, {"role": "assistant", …}], "rejected": […]}      whole conversations
{"prompt": "…" or messages, "chosen": "…" or messages, "rejected": …}            responses to a prompt
"""

from collections.abc import Mapping
from typing import Any

from slm_jax.chat.formats import PREFERENCES, MalformedConversationError, named_format, parse_conversation, type_name
from slm_jax.chat.messages import Message
from slm_jax.data.sources.documents import Document, Split

Messages = tuple[Message, ...]


def shared_messages(chosen: Messages, rejected: Messages) -> int:
    """Return the number of messages at the beginning of both conversations: the prompt."""
    count = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        count += 1
    return count


def preference_document(columns: Mapping[str, Any], split: Split | None) -> Document:
    """Return the document of a row: the chosen conversation, and the rejected one.

    Args:
        columns: The columns by name; `chosen` and `rejected` exist.
        split: The split that the data set assigns.

    Raises:
        MalformedConversationError: They are no conversations with a common prompt and different responses.
    """
    chosen, rejected = (_conversation(columns, name) for name in PREFERENCES.columns)
    _check(chosen, rejected)
    # Pairs with the same prompt are on one side of the split.
    prompt = "\n".join(message.content for message in chosen[: shared_messages(chosen, rejected)])
    return Document("", split=split, group=prompt, messages=chosen, rejected=rejected)


def _conversation(columns: Mapping[str, Any], name: str) -> Messages:
    """Return the conversation of a column, after the prompt if that is a column of its own.

    Raises:
        MalformedConversationError: It is none.
    """
    value, prompt = columns[name], columns.get("prompt")
    if isinstance(value, str):
        if not isinstance(prompt, str | list):
            raise MalformedConversationError(
                f"column {name} is text, and column prompt is {type_name(prompt)}, not text"
            )
        value = [{"role": "assistant", "content": value}]
    begins_with_response = isinstance(value, list) and bool(value) and _is_response(value[0])
    if begins_with_response and isinstance(prompt, str):
        value = [{"role": "user", "content": prompt}, *value]
    elif begins_with_response and isinstance(prompt, list):
        value = [*prompt, *value]
    return parse_conversation({name: value}, named_format("messages", name))


def _is_response(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role", turn.get("from")) in ("assistant", "gpt")


def _check(chosen: Messages, rejected: Messages) -> None:
    """Check that the conversations begin with the same prompt, differ after it, and end with the assistant.

    Raises:
        MalformedConversationError: It is not so.
    """
    shared = shared_messages(chosen, rejected)
    if shared == len(chosen) == len(rejected):
        raise MalformedConversationError("the columns chosen and rejected are equal")
    for messages, name in ((chosen, "chosen"), (rejected, "rejected")):
        if messages[-1].role != "assistant":
            raise MalformedConversationError(f"the last message of column {name} is not the assistant's")
        if shared == 0 or shared == len(messages) or messages[shared].role != "assistant":
            raise MalformedConversationError("the columns chosen and rejected do not begin with the same prompt")
