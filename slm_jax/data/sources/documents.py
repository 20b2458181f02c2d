"""Documents, and the protocols of the sources that they are read from.

A source yields its documents in a fixed order and resumes at any position, so that an interrupted corpus build
continues where it stopped and ends with the same bytes.
"""

import itertools
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from slm_jax.chat.messages import Message
from slm_jax.utils.text_windows import text_digest

Split = Literal["train", "validation"]


class _DocumentFields(NamedTuple):
    text: str
    response: str | None = None
    split: Split | None = None
    group: str = ""
    messages: tuple[Message, ...] | None = None
    rejected: tuple[Message, ...] | None = None


class Document(_DocumentFields):  # a subclass, because a NamedTuple itself cannot cache a property
    """One text of a source.

    Attributes:
        text: The text; for an instruction, its prompt; for a conversation, empty.
        response: For an instruction, the text that follows the prompt and is encoded separately; None otherwise.
        split: The split that the source itself assigns; None: the hash of the text decides.
        group: A text that documents with common content share: its hash decides about the split of all of them, also
            across sources; empty: each text decides for itself.
        messages: For a conversation, its messages; None otherwise.
        rejected: For a preference, the conversation that is not preferred to `messages`; None otherwise.
    """

    @property
    def strings(self) -> tuple[str, ...]:
        """The texts that are encoded each by itself: the text and its response, or the contents of the messages."""
        if self.messages is not None:
            return tuple(message.content for message in self.messages)
        return (self.text,) if self.response is None else (self.text, self.response)

    @property
    def size(self) -> int:
        """Characters of all texts."""
        return sum(map(len, self.strings))

    @cached_property
    def digest(self) -> int:
        """The `text_digest` that duplicates have in common.

        The text of an instruction is prompt and response, that of a conversation the contents of its messages, whose
        roles and template do not count.
        """
        return text_digest(" ".join(self.strings))


class InvalidRow(NamedTuple):
    """A row or line that is not a document.

    Attributes:
        reason: Why; invalid rows are counted by reason.
        location: File and line, or the like; the first location of each reason is reported.
    """

    reason: str
    location: str


class ReadState(Protocol):
    """The state of one pass over a source."""

    def position(self) -> Any:
        """Return the position after the last item as a JSON value: `Source.read(position)` resumes there."""

    @property
    def version(self) -> str:
        """The state of the source that is read, if it has a name (a commit on the hub); else empty."""


class Reader(ReadState, Protocol):
    """One pass over a source in its fixed order."""

    def __iter__(self) -> Iterator[Document | InvalidRow]:
        """Yield the items that have not been read yet.

        Raises:
            UserError: The source as a whole cannot be read.
        """


class Source(Protocol):
    """A named collection of documents.

    Attributes:
        name: The name for log lines, messages and the folder in the cache.
    """

    name: str

    def describe(self) -> Any:
        """Return a JSON value that changes whenever the documents may have changed; it is a part of the cache key."""

    def read(self, position: Any = None) -> Reader:
        """Read the documents from a position of `Reader.position` on; None: from the beginning."""


class CountingReader:
    """A `Reader` for sources that are cheap to read again: its position is the number of items read."""

    def __init__(self, items: Iterable[Document | InvalidRow], position: int | None = None, version: str = ""):
        """Create the reader.

        Args:
            items: All items of the source in their fixed order, those before `position` included.
            position: Number of items to skip; None: 0.
            version: See `Reader.version`.
        """
        self._items = items
        self._position = position or 0
        self.version = version

    def __iter__(self) -> Iterator[Document | InvalidRow]:
        for item in itertools.islice(self._items, self._position, None):
            self._position += 1
            yield item

    def position(self) -> int:
        """Return the number of items read."""
        return self._position
