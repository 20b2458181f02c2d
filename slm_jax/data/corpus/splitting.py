"""Read the sample of a source, assign its documents to training or validation by a plan, and drop duplicates."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from slm_jax.chat.messages import Message
from slm_jax.data.corpus.plan import SplitPlan, can_be_cut, cut_document, make_plan, split_digest
from slm_jax.data.sources.documents import Document, InvalidRow, Reader, Split
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural

SAMPLE_SIZE = 50 << 20  # characters at the beginning of a source, on which decisions about all of it are based
_MIN_DOCUMENTS = 20  # of the sample, if the source has as many
_CHARACTERS_PER_TOKEN = 8  # more than a token stands for on average
_MAX_INVALID = 1000  # invalid rows before the first document; then the source is reported instead of read to its end


class SplitText(NamedTuple):
    """A document, or one of the two parts of one that is cut for the split, with its split.

    Attributes:
        text: See `Document.text`.
        response: See `Document.response`.
        split: The split.
        digest: The `Document.digest` of the whole document.
        ends: Whether the document ends here, with an <EOS>.
        messages: See `Document.messages`.
    """

    text: str
    response: str | None
    split: Split
    digest: int
    ends: bool = True
    messages: tuple[Message, ...] | None = None

    @property
    def strings(self) -> tuple[str, ...]:
        """See `Document.strings`."""
        return Document(self.text, self.response, messages=self.messages).strings

    @property
    def size(self) -> int:
        """See `Document.size`."""
        return sum(map(len, self.strings))


class Cut(NamedTuple):
    """The two parts of a document that is cut for the split.

    Attributes:
        held_out: The part that is held out, with its split.
        rest: The part that is trained on.
        gap: Characters between them, which are not used.
    """

    held_out: Any
    rest: Any
    gap: int


class Assignable(Protocol):
    """A document with what its split depends on; its text may be stored in encoded form (see `merge`)."""

    @property
    def is_empty(self) -> bool:
        """True if it has nothing to predict."""

    @property
    def digest(self) -> int:
        """Its `Document.digest`."""

    @property
    def split_digest(self) -> int:
        """Its `split_digest`."""

    @property
    def has_group(self) -> bool:
        """True if it belongs to a group."""

    @property
    def own_split(self) -> Split | None:
        """The split that the source assigns."""

    def whole(self, split: Split) -> Any:
        """Return the text of a split, to be encoded or encoded."""

    def cut(self, plan: SplitPlan, max_held_out: int) -> Cut | None:
        """Return the two parts, see `cut_document`; None if it is not cut."""


class ReadDocument:
    """An `Assignable` of a document that was read."""

    def __init__(self, document: Document, by_beginning: bool = False):
        """Wrap a document.

        Args:
            document: The document.
            by_beginning: See `split_digest`.
        """
        self._document = document
        self._by_beginning = by_beginning

    @property
    def is_empty(self) -> bool:
        """True if it has nothing to predict."""
        return is_empty(self._document)

    @property
    def digest(self) -> int:
        """Its `Document.digest`."""
        return self._document.digest

    @property
    def split_digest(self) -> int:
        """Its `split_digest`."""
        return split_digest(self._document, self._by_beginning) if self.has_group or self._by_beginning else self.digest

    @property
    def has_group(self) -> bool:
        """True if it belongs to a group."""
        return bool(self._document.group)

    @property
    def own_split(self) -> Split | None:
        """The split that the source assigns."""
        return self._document.split

    def whole(self, split: Split) -> SplitText:
        """Return the text of a split."""
        return whole_text(self._document, split, self.digest)

    def cut(self, plan: SplitPlan, max_held_out: int) -> Cut | None:
        """Return the two parts; None if it is not cut."""
        if not can_be_cut(self._document, plan.min_cut):
            return None
        return cut_text(self._document.text, self.digest, plan, max_held_out)


def whole_text(document: Document, split: Split, digest: int) -> SplitText:
    """Return the text of a document that is not cut."""
    return SplitText(document.text, document.response, split, digest, messages=document.messages)


def cut_text(text: str, digest: int, plan: SplitPlan, max_held_out: int) -> Cut | None:
    """Return the two parts of a document's text; None if it is not cut.

    Args:
        text: The text.
        digest: The `Document.digest` of its document.
        plan: Where documents are cut.
        max_held_out: The largest number of characters that is held out; 0: no limit.
    """
    parts = cut_document(text, plan.cut, max_held_out)
    if parts is None:
        return None
    return Cut(
        SplitText(parts.held_out, None, "validation", digest, ends=False),
        SplitText(parts.rest, None, "train", digest),
        len(text) - len(parts.held_out) - len(parts.rest),
    )


@dataclass
class SourceCounts:
    """Statistics of a source.

    Attributes:
        documents: Documents read, those that were dropped included.
        duplicates: Documents that were dropped as duplicates: they differ in white space at most.
        empty: Documents without text.
        invalid: Invalid rows by reason.
        examples: The location of the first invalid row of each reason.
        held_out: Characters that are held out.
        cut: Documents that were cut for the split.
        gaps: Characters between the parts of these, which are not used.
    """

    documents: int = 0
    duplicates: int = 0
    empty: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    held_out: int = 0
    cut: int = 0
    gaps: int = 0

    def add_invalid(self, row: InvalidRow) -> None:
        """Count an invalid row."""
        self.invalid[row.reason] += 1
        self.examples.setdefault(row.reason, row.location)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value, which shares nothing with the counts."""
        return {
            "documents": self.documents,
            "repeats": self.duplicates,
            "empty": self.empty,
            "bad": dict(self.invalid),
            "examples": dict(self.examples),
            "held_out": self.held_out,
            "cut": self.cut,
            "gaps": self.gaps,
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "SourceCounts":
        """Return the counts of a value of `to_json`; format 2 of the corpus had no counts of the split."""
        return cls(
            documents=saved["documents"],
            duplicates=saved["repeats"],
            empty=saved["empty"],
            invalid=Counter(saved["bad"]),
            examples=dict(saved["examples"]),
            held_out=saved.get("held_out", 0),
            cut=saved.get("cut", 0),
            gaps=saved.get("gaps", 0),
        )

    def invalid_text(self) -> str:
        """Return a description of the invalid rows; empty if there are none."""
        if not self.invalid:
            return ""
        reasons = [
            f"{count:,} x {reason} (first: {self.examples[reason]})" for reason, count in self.invalid.most_common(5)
        ]
        return f"{plural(self.invalid.total(), 'invalid row')} skipped: " + "; ".join(reasons)

    def skipped_text(self) -> str:
        """Return a description of everything that was left out, each part after a semicolon; empty for nothing."""
        parts = [self.invalid_text()]
        if self.empty:
            parts.append(f"{plural(self.empty, 'empty document')} skipped")
        if self.duplicates:
            parts.append(f"{plural(self.duplicates, 'duplicate')} skipped")
        return "".join(f"; {part}" for part in parts if part)


class SourceSample:
    """The first items of a source, kept so that they are read only once, and the reader of the rest.

    Attributes:
        reader: The reader, whose position is that after the last item read.
        items: The first items.
        complete: Whether these are all items of the source.
        counts: Invalid rows and empty documents among them.
    """

    def __init__(self, reader: Reader, max_documents: int = 0, max_tokens: int = 0):
        """Read the sample.

        Args:
            reader: The reader of the source.
            max_documents: Read about as much as this many training documents take; 0: no limit.
            max_tokens: Read about as much as this many training tokens take; 0: no limit.

        Raises:
            UserError: The source has no training text.
        """
        self.reader = reader
        self.items: list[Document | InvalidRow] = []
        self.complete = False
        self.counts = SourceCounts()
        self._rest = iter(reader)
        max_size = min(SAMPLE_SIZE, _CHARACTERS_PER_TOKEN * max_tokens) if max_tokens else SAMPLE_SIZE
        max_number = 2 * max_documents + _MIN_DOCUMENTS if max_documents else math.inf
        size = 0
        number = 0
        for item in self._rest:
            self.items.append(item)
            if isinstance(item, InvalidRow):
                self.counts.add_invalid(item)
                if not size and len(self.items) >= _MAX_INVALID:
                    break
            elif is_empty(item):
                self.counts.empty += 1
            # Validation text that comes first is read past: the tokenizer needs training text to learn from.
            elif item.split != "validation":
                size += item.size
                number += 1
            if size >= max_size or number >= max_number:
                return
        self.complete = True
        if not size:
            lacks_column = any(" is missing (columns: " in each for each in self.counts.invalid)
            remedy = ". Name the column of the text with --data.text_field" if lacks_column else ""
            other = "; all of it is the source's validation text" if self.items else "; the source has no documents"
            raise UserError(f"there is no text to train on{self.counts.skipped_text() or other}{remedy}")

    def documents(self) -> list[Document]:
        """Return the documents of the sample that are not empty."""
        return [item for item in self.items if isinstance(item, Document) and not is_empty(item)]

    def plan(self, fraction: float) -> SplitPlan:
        """Return the plan of the source.

        Args:
            fraction: The fraction of the text that is held out for validation.

        Raises:
            UserError: There is too little text for both splits; names what was skipped.
        """
        try:
            return make_plan(self.documents(), fraction, self.complete)
        except UserError as error:
            raise UserError(f"{error}{self.counts.skipped_text()}") from None

    def has_conversations(self) -> bool:
        """Return whether a document of the sample is a conversation."""
        return any(isinstance(item, Document) and item.messages is not None for item in self.items)

    def all_items(self) -> Iterator[Document | InvalidRow]:
        """Yield the items of the sample, then the rest of the source; can be called once."""
        return itertools.chain(self.items, self._rest)


def is_empty(document: Document) -> bool:
    """Return whether a document has nothing to predict."""
    if document.messages is not None:
        return not any(each.role == "assistant" and each.content.strip() for each in document.messages)
    predicted = document.text if document.response is None else document.response
    return not predicted or predicted.isspace()


class SplitAssigner:
    """Assign documents to train or validation in arrival order, and drop duplicates."""

    def __init__(
        self,
        plan: SplitPlan,
        deduplicate: bool = True,
        max_held_out: int = 0,
        train_digests: Iterable[int] = (),
        validation_digests: Iterable[int] = (),
    ):
        """Start with no documents, or with those assigned before an interruption.

        Args:
            plan: The plan of the source.
            deduplicate: Whether to drop duplicates of training documents; duplicates of held-out ones always are.
            max_held_out: Characters that are held out at most, except by the source itself; 0: no limit.
            train_digests: Digests of the training documents assigned before.
            validation_digests: Digests of the held-out documents assigned before.
        """
        self._plan = plan
        self._deduplicate = deduplicate
        self._max_held_out = max_held_out
        self._train = set(train_digests)
        self._validation = set(validation_digests)

    def assign(self, document: Document | Assignable, counts: SourceCounts) -> list[Any]:
        """Return the text of a document with its split.

        Args:
            document: The next document of the source.
            counts: Statistics, which are updated.

        Returns:
            Nothing if the document is empty or a duplicate, two texts if it is cut for the split: SplitText of a
            Document, else what `Assignable.whole` and `Assignable.cut` return.
        """
        if isinstance(document, Document):
            document = ReadDocument(document, self._plan.by_beginning)
        counts.documents += 1
        if document.is_empty:
            counts.empty += 1
            return []
        digest = document.digest
        # Validation text is never trained on, even where duplicates are kept.
        if digest in self._validation or digest in self._train:
            counts.duplicates += 1
            return []
        texts = self._cut(document, counts) or [document.whole(self._split(document, counts))]
        for text in texts:
            if text.split == "validation":
                self._validation.add(digest)
                counts.held_out += text.size
            elif self._deduplicate:
                self._train.add(digest)
        return texts

    def _split(self, document: Assignable, counts: SourceCounts) -> Split:
        if self._plan.predefined:
            return document.own_split or "train"
        is_held_out = self._plan.holds_out(document.split_digest)
        # A group is never divided: it has text in common.
        is_full = bool(self._max_held_out) and counts.held_out >= self._max_held_out and not document.has_group
        return "validation" if is_held_out and not is_full else "train"

    def _cut(self, document: Assignable, counts: SourceCounts) -> list[Any]:
        """Return the two parts of a document that is cut for the split; none if it stays whole."""
        remaining = self._max_held_out - counts.held_out
        if not self._plan.cut or (self._max_held_out and remaining <= 0):
            return []
        cut = document.cut(self._plan, remaining if self._max_held_out else 0)
        if cut is None:
            return []
        counts.cut += 1
        counts.gaps += cut.gap
        return [cut.held_out, cut.rest]
