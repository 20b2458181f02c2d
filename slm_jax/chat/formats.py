"""Conversations in the rows of data sets: OpenAI messages, ShareGPT, alpaca and dolly.

A row is parsed as a whole or not at all: turns are never dropped or merged, so that what is trained on is what the data
set contains.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from slm_jax.chat.messages import ROLE_ALIASES, ROLES, Message

_DATASET_ROLES = {
    "human": "user",
    "gpt": "assistant",
    **ROLE_ALIASES,
}  # ShareGPT's names, and that of newer OpenAI APIs
_TURN_COLUMNS = ("messages", "conversations", "conversation")


class RowFormat(NamedTuple):
    """The format of rows that hold a conversation each.

    Attributes:
        name: `messages`, `sharegpt`, `alpaca` or `dolly`.
        columns: The columns that every row has: one of turns, or those of the instruction and of the response.
        optional: The column of the instruction's input, which may be missing or empty; empty for turns.
    """

    name: str
    columns: tuple[str, ...]
    optional: str = ""

    @property
    def title(self) -> str:
        """A description for the log: `OpenAI format (column messages)`."""
        names = {"messages": "OpenAI", "sharegpt": "ShareGPT"}
        columns = [*self.columns[:1], self.optional, *self.columns[1:]] if self.optional else self.columns
        noun = "column" if len(columns) == 1 else "columns"
        return f"{names.get(self.name, self.name)} format ({noun} {', '.join(columns)})"


ALPACA = RowFormat("alpaca", ("instruction", "output"), "input")
PREFERENCES = RowFormat("preferences", ("chosen", "rejected"), "prompt")
DOLLY = RowFormat("dolly", ("instruction", "response"), "context")


class MalformedConversationError(ValueError):
    """A row is not a conversation; the text is the reason, which is the same for all rows with the same fault."""


def named_format(name: str, column: str = "") -> RowFormat:
    """Return the format of a name.

    Args:
        name: `messages`, `sharegpt`, `alpaca`, `dolly` or `preferences`.
        column: The column of the turns; empty: that of the format.
    """
    if name in ("alpaca", "dolly", "preferences"):
        return {"alpaca": ALPACA, "dolly": DOLLY, "preferences": PREFERENCES}[name]
    return RowFormat(name, (column or ("conversations" if name == "sharegpt" else "messages"),))


def format_of_columns(columns: Collection[str]) -> RowFormat | None:
    """Return the format of rows with these columns, None if they hold no conversations."""
    if all(name in columns for name in PREFERENCES.columns):  # first: some have a column of messages as well
        return PREFERENCES
    for column in _TURN_COLUMNS:
        if column in columns:
            return RowFormat("messages" if column == "messages" else "sharegpt", (column,))
    return next((each for each in (ALPACA, DOLLY) if all(name in columns for name in each.columns)), None)


def format_of_row(row: Mapping[str, Any]) -> RowFormat | None:
    """Return the format of a row, None if it holds no conversation.

    The keys of its first message distinguish OpenAI messages from ShareGPT, whatever the name of the column.
    """
    found = format_of_columns(row.keys())
    if found == PREFERENCES:
        return found if all(isinstance(row[name], str | list) for name in found.columns) else None
    if found is None or len(found.columns) > 1:
        is_text = found is not None and all(isinstance(row[name], str) for name in found.columns)
        return found if is_text else None
    turns = row[found.columns[0]]
    if not isinstance(turns, list):
        return None
    if turns and isinstance(turns[0], Mapping):
        return found._replace(name="sharegpt" if "from" in turns[0] else "messages")
    return found


def parse_conversation(row: Mapping[str, Any], row_format: RowFormat) -> tuple[Message, ...]:
    """Return the conversation of a row.

    An empty system message is left out, as data sets without one for a row have it. A last message of the user that
    nobody has answered stays.

    Args:
        row: The columns by name; those of the format exist.
        row_format: The format.

    Raises:
        MalformedConversationError: The row is not a conversation with a turn of the assistant.
    """
    if len(row_format.columns) == 1:
        messages = _turns(row[row_format.columns[0]], row_format.columns[0])
    else:
        messages = _instruction(row, row_format)
    messages = [each for each in messages if each.role != "system" or each.content.strip()]
    _check(messages)
    return tuple(messages)


def _instruction(row: Mapping[str, Any], row_format: RowFormat) -> list[Message]:
    """Return the two messages of an instruction; its input follows it after an empty line."""
    for name in row_format.columns:
        if not isinstance(row[name], str):
            raise MalformedConversationError(f"column {name} is {type_name(row[name])}, not text")
        if not row[name].strip():
            raise MalformedConversationError(f"column {name} is empty")
    instruction, response = (row[name] for name in row_format.columns)
    context = row.get(row_format.optional) or ""
    if not isinstance(context, str):
        raise MalformedConversationError(f"column {row_format.optional} is {type_name(context)}, not text")
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return [Message("user", prompt), Message("assistant", response)]


def _turns(turns: Any, column: str) -> list[Message]:
    if not isinstance(turns, list):
        raise MalformedConversationError(f"column {column} is {type_name(turns)}, not a list of messages")
    return [_message(turn) for turn in turns]


def _message(turn: Any) -> Message:
    """Return a message with the keys `role` and `content`, or ShareGPT's `from` and `value`."""
    if not isinstance(turn, Mapping):
        raise MalformedConversationError(f"a message is {type_name(turn)}, not an object with role and content")
    role_key, content_key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    for key in (role_key, content_key):
        if key not in turn:
            raise MalformedConversationError(f"a message has no {key}")
    name = turn[role_key]
    role = _DATASET_ROLES.get(name, name) if isinstance(name, str) else ""
    if role not in ROLES:
        raise MalformedConversationError(f"the role {str(name)[:40]!r} is unknown (roles: {', '.join(ROLES)})")
    if turn.get("tool_calls"):
        raise MalformedConversationError("a message calls tools, which is not supported")
    if turn.get("weight") == 0:
        raise MalformedConversationError("a message has weight 0, which is not supported")
    return Message(role, content_text(turn[content_key]))


def content_text(content: Any) -> str:
    """Return the text of a message's content: a text, or OpenAI's list of parts of type text, joined by line breaks.

    Raises:
        MalformedConversationError: The content is neither.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MalformedConversationError(f"the content of a message is {type_name(content)}, not text")
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type_name(part)
            raise MalformedConversationError(f"a message has a part of type {str(kind)[:40]}: only text is read")
        parts.append(part["text"])
    return "\n".join(parts)


def _check(messages: list[Message]) -> None:
    """Check that no message is empty, and that user and assistant take turns, with at most one system message first.

    Raises:
        MalformedConversationError: It is not so, or the assistant has no turn.
    """
    previous = ""
    for message in messages:
        if not message.content.strip():
            raise MalformedConversationError(f"a message of role {message.role} is empty")
        if message.role == "system" and previous:
            raise MalformedConversationError("a system message is not the first message")
        if message.role == previous:
            raise MalformedConversationError(f"two messages of role {message.role} in a row")
        if message.role == "assistant" and previous in ("", "system"):
            raise MalformedConversationError("a message of the assistant comes before the first of the user")
        previous = message.role
    if not any(message.role == "assistant" for message in messages):
        raise MalformedConversationError("no message is the assistant's")


def type_name(value: Any) -> str:
    """Return the type of a JSON value in words, for messages."""
    if value is None:
        return "empty (null)"
    name = type(value).__name__
    return {"dict": "an object", "list": "a list", "str": "text"}.get(name, f"of type {name}")
