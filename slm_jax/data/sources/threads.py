"""Threads of message trees, as Open Assistant publishes them: a row per message, the rows of a tree together."""

from collections.abc import Iterator, Mapping
from typing import Any

from slm_jax.chat.formats import RowFormat
from slm_jax.chat.messages import Message
from slm_jax.data.sources.documents import Document, InvalidRow, Split
from slm_jax.data.sources.rows import Row

THREADS = RowFormat("oasst", ("message_tree_id", "message_id", "parent_id", "role", "text"))
_OPTIONAL = ("rank", "deleted")
_ROLES = {"prompter": "user", "assistant": "assistant"}


class ThreadJoiner:
    """Collect the messages of a tree, and choose the thread that was ranked best at every message.

    One thread of each tree, since threads of a tree share their first messages.

    Attributes:
        rows: The messages of the current tree, as JSON values.
    """

    def __init__(self, rows: list[dict[str, Any]]):
        """Start with the messages that were read before an interruption."""
        self.rows = list(rows)
        self._location = ""

    def add(self, row: Row) -> Iterator[Document | InvalidRow]:
        """Add a message; yields the thread of the tree before it if it begins another one."""
        value = row.value
        missing = [name for name in THREADS.columns if not isinstance(value, Mapping) or name not in value]
        if missing:
            yield InvalidRow(f"column {missing[0]} is missing", row.location)
            return
        is_next = bool(self.rows) and self.rows[0]["message_tree_id"] != value["message_tree_id"]
        finished = list(self.end(row.split)) if is_next else []
        self._location = row.location
        self.rows.append({name: value.get(name) for name in (*THREADS.columns, *_OPTIONAL)})
        yield from finished  # after the state has the row, which a reader that resumes here does not read again

    def end(self, split: Split | None) -> Iterator[Document | InvalidRow]:
        """Yield the thread of the current tree, if there is one."""
        if not self.rows:
            return
        messages = _best_thread(self.rows)
        is_usable = len(messages) > 1 and all(each.content and each.content.strip() for each in messages)
        self.rows = []
        if is_usable:
            yield Document("", split=split, messages=tuple(messages))
        else:
            yield InvalidRow("a tree of messages without a prompt and its answer", self._location)


def _best_thread(rows: list[dict[str, Any]]) -> list[Message]:
    """Return the messages from the root on, at each the answer with the lowest rank; the last is the assistant's."""
    replies: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["deleted"]:
            replies.setdefault(row["parent_id"], []).append(row)
    messages: list[Message] = []
    parent: Any = None
    while following := replies.pop(parent, None):  # each once, so that a cycle ends
        best = min(following, key=lambda row: float("inf") if row["rank"] is None else row["rank"])
        role = "assistant" if len(messages) % 2 else "user"
        if _ROLES.get(best["role"]) != role:
            break
        messages.append(Message(role, best["text"]))
        parent = best["message_id"]
    return messages[: len(messages) // 2 * 2]
