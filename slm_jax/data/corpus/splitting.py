"""Assign documents to training or validation by a hash of their text, and drop exact duplicates.

The split of a text depends on nothing but the text, so that adding documents moves none from one split to the other.
"""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from slm_jax.data.sources.documents import Document, InvalidRow, Reader, Split
from slm_jax.utils.errors import UserError

# Characters; longer documents are cut into parts of this size, so that validation text can be taken from a few novels.
_PART_SIZE = 10_000
_MIN_PARTS = 20  # a text of fewer parts is cut into about this many
_MAX_HASH = 2**64
SAMPLE_SIZE = 50 << 20  # characters at the beginning of a source, on which decisions about all of it are based
_CHARACTERS_PER_TOKEN = 8  # more than a token stands for on average
_MAX_INVALID = 1000  # invalid rows before the first document; then the source is reported instead of read to its end


class SplitText(NamedTuple):
    """A document, or a part of one, with its split.

    Attributes:
        text: See `Document.text`.
        response: See `Document.response`.
        split: The split.
        digest: The first 8 bytes of the SHA-256 of text and response.
    """

    text: str
    response: str | None
    split: Split
    digest: int


@dataclass(frozen=True)
class SplitPlan:
    """Decisions about all of a source that are based on its sample.

    Attributes:
        part_size: Characters of the parts that long documents are cut into.
        held_out: The digest of a text that is held out although it is above the fraction; None: not needed.
        predefined: Whether the source assigns the splits itself.
    """

    part_size: int
    held_out: int | None
    predefined: bool

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {"part": self.part_size, "held_out": self.held_out, "own": self.predefined}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "SplitPlan":
        """Return the plan of a value of `to_json`."""
        return cls(saved["part"], saved["held_out"], saved["own"])


@dataclass
class SourceCounts:
    """Statistics of a source.

    Attributes:
        documents: Documents read, those that were dropped included.
        duplicates: Texts that were dropped as exact duplicates.
        empty: Documents without text.
        invalid: Invalid rows by reason.
        examples: The location of the first invalid row of each reason.
    """

    documents: int = 0
    duplicates: int = 0
    empty: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

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
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "SourceCounts":
        """Return the counts of a value of `to_json`."""
        invalid = Counter(saved["bad"])
        return cls(saved["documents"], saved["repeats"], saved["empty"], invalid, dict(saved["examples"]))

    def invalid_text(self) -> str:
        """Return a description of the invalid rows; empty if there are none."""
        if not self.invalid:
            return ""
        reasons = [
            f"{count:,} x {reason} (first: {self.examples[reason]})" for reason, count in self.invalid.most_common(5)
        ]
        return f"{self.invalid.total():,} invalid rows skipped: " + "; ".join(reasons)


class SourceSample:
    """The first items of a source, kept so that they are read only once, and the reader of the rest.

    Attributes:
        reader: The reader, whose position is that after the last item read.
        items: The first items.
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
        self._rest = iter(reader)
        max_size = min(SAMPLE_SIZE, _CHARACTERS_PER_TOKEN * max_tokens) if max_tokens else SAMPLE_SIZE
        max_number = 2 * max_documents + _MIN_PARTS if max_documents else math.inf
        counts = SourceCounts()
        size = 0
        number = 0
        for item in self._rest:
            self.items.append(item)
            if isinstance(item, InvalidRow):
                counts.add_invalid(item)
                if not size and len(self.items) >= _MAX_INVALID:
                    break
            # Validation text that comes first is read past: the tokenizer needs training text to learn from.
            elif item.split != "validation" and not is_empty(item):
                size += len(item.text) + len(item.response or "")
                number += 1
            if size >= max_size or number >= max_number:
                return
        if not size:
            raise UserError(f"there is no text to train on; {counts.invalid_text() or 'all documents are empty'}")

    def documents(self) -> list[Document]:
        """Return the documents of the sample that are not empty."""
        return [item for item in self.items if isinstance(item, Document) and not is_empty(item)]

    def all_items(self) -> Iterator[Document | InvalidRow]:
        """Yield the items of the sample, then the rest of the source; can be called once."""
        return itertools.chain(self.items, self._rest)


def is_empty(document: Document) -> bool:
    """Return whether a document has nothing to predict."""
    predicted = document.text if document.response is None else document.response
    return not predicted.strip()


def make_plan(documents: list[Document], fraction: float) -> SplitPlan:
    """Return the plan for a source.

    Long documents are cut into parts, and a text of few parts into about 20 (adding text to such a small one can move
    parts to the other split). If no hash of the sample is below the fraction, the lowest one is held out.

    Args:
        documents: The documents of the sample.
        fraction: The fraction of the texts that is held out for validation.

    Raises:
        UserError: There is too little text for both splits.
    """
    if any(document.split for document in documents):
        return SplitPlan(_PART_SIZE, None, predefined=True)
    part_size = _PART_SIZE
    if sum(1 for document in documents for _ in _parts(document, part_size)) < _MIN_PARTS:
        # Of three large parts, holding out one would take a third of the text.
        part_size = max(1, sum(len(document.text) for document in documents) // _MIN_PARTS)
    digests = {_digest(part) for document in documents for part in _parts(document, part_size)}
    if len(digests) < 2:
        raise UserError("the text is too short to be split into training and validation: add more")
    limit = fraction * _MAX_HASH
    if all(digest < limit for digest in digests):
        raise UserError("all of the text would be held out for validation: add more, or lower data.validation_fraction")
    held_out = None if min(digests) < limit else min(digests)
    return SplitPlan(part_size, held_out, predefined=False)


class SplitAssigner:
    """Assign texts to train or validation in arrival order, and drop duplicates."""

    def __init__(
        self,
        plan: SplitPlan,
        fraction: float,
        deduplicate: bool = True,
        train_digests: Iterable[int] = (),
        validation_digests: Iterable[int] = (),
    ):
        """Start with no texts, or with those assigned before an interruption.

        Args:
            plan: The plan of the source.
            fraction: The fraction of the texts that is held out for validation.
            deduplicate: Whether to drop duplicates of training texts; duplicates of validation texts always are.
            train_digests: Digests of the training texts assigned before.
            validation_digests: Digests of the validation texts assigned before.
        """
        self._plan = plan
        self._limit = fraction * _MAX_HASH
        self._deduplicate = deduplicate
        self._train = set(train_digests)
        self._validation = set(validation_digests)

    def assign(self, document: Document, counts: SourceCounts) -> Iterator[SplitText]:
        """Yield the texts of a document with their splits: none if it is empty or a duplicate, several if it is long.

        Args:
            document: The next document of the source.
            counts: Statistics, which are updated.
        """
        counts.documents += 1
        if is_empty(document):
            counts.empty += 1
            return
        for part in [document] if self._plan.predefined else _parts(document, self._plan.part_size):
            digest = _digest(part)
            # Validation text is never trained on, even where duplicates are kept.
            if digest in self._validation or digest in self._train:
                counts.duplicates += 1
                continue
            split: Split = part.split or ("validation" if self._is_held_out(digest) else "train")
            if split == "validation":
                self._validation.add(digest)
            elif self._deduplicate:
                self._train.add(digest)
            yield SplitText(part.text, part.response, split, digest)

    def _is_held_out(self, digest: int) -> bool:
        return digest < self._limit or digest == self._plan.held_out


def _parts(document: Document, size: int) -> Iterator[Document]:
    """Yield a document in parts of about `size` characters; instructions are never cut.

    Cuts are made after a line break, else after a space, else anywhere.
    """
    text = document.text
    if document.response is not None or len(text) <= 1.5 * size:
        yield document
        return
    start = 0
    while len(text) - start > 1.5 * size:
        limit = start + size
        cut = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start, limit) + 1 or limit
        yield Document(text[start:cut])
        start = cut
    yield Document(text[start:])


def _digest(document: Document) -> int:
    text = document.text + (document.response or "")
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
