"""Which split a text belongs to: training or validation, decided by the text's own hash; exact repeats are dropped."""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from slm_jax.data.sources.documents import Document, InvalidRow, Reader, Split
from slm_jax.utils.errors import UserError

_LONG = 10_000  # characters; longer documents are split in parts of this size, so that a few novels can be validated on
_FEW = 20  # parts; fewer are cut into about so many
SAMPLE_SIZE = (
    50 << 20
)  # characters; what is decided once for all of a source is decided on its beginning, of this length
_PER_TOKEN = 8  # characters; more than a token stands for
_HOPELESS = 1000  # bad rows before the first good one: then the source is told to be wrong rather than read to its end


class Text(NamedTuple):
    """A document or a part of one, on its split. digest: the first 8 bytes of the SHA-256 of its text."""

    text: str
    response: str | None
    split: Split
    digest: int


@dataclass(frozen=True)
class Plan:
    """What the head of a source decides for all of it. All JSON.

    part: characters of the parts that long documents are cut into. held_out: the digest that is held out although it is
    above the fraction, where the head has no other. own: the source has sides of its own.
    """

    part: int
    held_out: int | None
    own: bool


@dataclass
class SourceCounts:
    """What was met in a source so far."""

    documents: int = 0
    repeats: int = 0
    empty: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def note(self, bad: InvalidRow) -> None:
        """Count a bad row."""
        self.bad[bad.reason] += 1
        self.examples.setdefault(bad.reason, bad.where)

    def to_json(self) -> dict[str, Any]:
        """As plain dicts."""
        return {**vars(self), "bad": dict(self.bad), "examples": dict(self.examples)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "SourceCounts":
        """The inverse of `to_json`."""
        return cls(**{**saved, "bad": Counter(saved["bad"]), "examples": dict(saved["examples"])})

    def invalid_text(self) -> str:
        """The bad rows in words, "" if there are none."""
        each = [f"{n:,} x {reason} (first: {self.examples[reason]})" for reason, n in self.bad.most_common(5)]
        return f"{self.bad.total():,} bad rows left out: " + "; ".join(each) if each else ""


@dataclass
class SourceSample:
    """The first things that a reader gives, kept so that they are read once."""

    items: list[Document | InvalidRow]
    whole: bool  # there is no more

    @classmethod
    def take(cls, reader: Iterator[Document | InvalidRow], documents: int = 0, tokens: int = 0) -> "SourceSample":
        """Reads the head, no more than about what so many documents or tokens take (0: no limit).

        Raises UserError if there is nothing but bad rows.
        """
        items: list[Document | InvalidRow] = []
        size = number = 0
        limit = min(SAMPLE_SIZE, _PER_TOKEN * tokens or SAMPLE_SIZE)
        most = 2 * documents + _FEW if documents else math.inf
        counts = SourceCounts()
        for item in reader:
            items.append(item)
            if isinstance(item, InvalidRow):
                counts.note(item)
                if not size and len(items) >= _HOPELESS:
                    break
            elif item.split != "validation" and not is_empty(
                item
            ):  # all of it, so that the tokenizer finds text to learn from
                size += len(item.text) + len(item.response or "")
                number += 1
            if size >= limit or number >= most:
                return cls(items, False)
        if not size:
            raise UserError(f"there is no text to train on; {counts.invalid_text() or 'all documents are empty'}")
        return cls(items, True)

    def documents(self) -> list[Document]:
        """Those that are not empty."""
        return [item for item in self.items if isinstance(item, Document) and not is_empty(item)]


def is_empty(document: Document) -> bool:
    """Whether there is nothing to learn."""
    return not (document.text if document.response is None else document.response).strip()


def make_plan(documents: list[Document], fraction: float) -> Plan:
    """The plan for a source that begins with these documents. Raises UserError if they are too little text.

    Long documents are cut into parts first, and a text of few parts into about 20 (adding to so small a text moves
    them). Where no hash falls below the fraction, the lowest one is held out.
    """
    if any(document.split for document in documents):
        return Plan(_LONG, None, own=True)
    part = _LONG
    if sum(1 for document in documents for _ in _parts(document, part)) < _FEW:
        part = max(1, sum(len(document.text) for document in documents) // _FEW)  # else a third of the text is held out
    digests = {_digest(each) for document in documents for each in _parts(document, part)}
    if len(digests) < 2:
        raise UserError("the text is too short to be split into training and validation: add more")
    held_out = None if min(digests) < fraction * 2**64 else min(digests)
    if all(digest < fraction * 2**64 for digest in digests):
        raise UserError("all of the text would be held out for validation: add more, or lower data.validation_fraction")
    return Plan(part, held_out, own=False)


class SplitAssigner:
    """Puts texts on their sides, in the order of their coming."""

    def __init__(
        self,
        plan: Plan,
        fraction: float,
        deduplicate: bool = True,
        trained: Iterable[int] = (),
        validated: Iterable[int] = (),
    ):
        """trained, validated: digests of the texts that were placed before."""
        self._plan, self._limit, self._deduplicate = plan, fraction * 2**64, deduplicate
        self._trained, self._validated = set(trained), set(validated)

    def assign(self, document: Document, counts: SourceCounts) -> Iterator[Text]:
        """The texts that a document comes to: none if it is empty or a repeat, several if it is long."""
        counts.documents += 1
        if is_empty(document):
            counts.empty += 1
            return
        for each in [document] if self._plan.own else _parts(document, self._plan.part):
            digest = _digest(each)
            # What is validated on is not trained on, even where repeats are wanted.
            if digest in self._validated or digest in self._trained:
                counts.repeats += 1
                continue
            split: Split = each.split or ("validation" if self._is_held_out(digest) else "train")
            if split == "validation":
                self._validated.add(digest)
            elif self._deduplicate:
                self._trained.add(digest)
            yield Text(each.text, each.response, split, digest)

    def _is_held_out(self, digest: int) -> bool:
        return digest < self._limit or digest == self._plan.held_out


def split_documents(documents: Iterable[Document], fraction: float) -> tuple[list[Text], list[Text]]:
    """(train, validation) texts of a source that fits in memory. Raises UserError if there is too little text."""
    kept = [document for document in documents if not is_empty(document)]
    assigner = SplitAssigner(make_plan(kept, fraction), fraction)
    counts = SourceCounts()
    texts = list(itertools.chain.from_iterable(assigner.assign(document, counts) for document in kept))
    return [t for t in texts if t.split == "train"], [t for t in texts if t.split == "validation"]


def read_sample(
    reader: Reader, documents: int = 0, tokens: int = 0
) -> tuple[SourceSample, Iterator[Document | InvalidRow]]:
    """The head of a source (see `SourceSample.take`), and what comes after it."""
    rest = iter(reader)
    return SourceSample.take(rest, documents, tokens), rest


def _parts(document: Document, size: int) -> Iterator[Document]:
    """A document in parts of about `size` characters, cut after a line (else after a space, else anywhere); an
    instruction is never cut."""
    text = document.text
    if document.response is not None or len(text) <= 1.5 * size:
        yield document
        return
    start = 0
    while len(text) - start > 1.5 * size:
        limit = start + size
        cut = max(text.rfind("\n", start, limit), -1) + 1 or max(text.rfind(" ", start, limit), -1) + 1 or limit
        yield Document(text[start:cut])
        start = cut
    yield Document(text[start:])


def _digest(document: Document) -> int:
    text = document.text + (document.response or "")
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
