"""Decide how a source is split: which documents are held out for validation, or where a few long ones are cut.

Documents are held out whole, by a hash of their text, so that adding documents moves none from one split to the other.
Only if the documents are so few, or so different in size, that this would hold out far too much or too little, the plan
departs from the hash: by other whole documents, or, for want of such, by cutting each long document once.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from slm_jax.data.sources.documents import Document
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural
from slm_jax.utils.text_windows import text_digest

_MAX_HASH = 2**64
# The share of the characters that is held out may be this many times the fraction.
_LOWEST = 0.25
_HIGHEST = 2.0
_FEW = 20  # documents; fewer are cut if none of them can be held out, and so is one with more than half of the text
_LARGE = 1_000_000  # characters; if the documents of a sample are larger on average, all of the source are few
_SMALL = 0.01  # of the text; smaller documents are trained on whole where others are cut
_MIN_CUT = 40  # characters; shorter documents are not cut
_MIN_HELD_OUT = 200  # characters, or a fifth of the document; less is not worth validating on
_MAX_GAP = 1000  # characters between the two parts of a document, of which one in fifty is left out at most


@dataclass(frozen=True)
class SplitPlan:
    """Decisions about all of a source that are based on its sample.

    Attributes:
        limit: Documents whose `split_digest` is below are held out.
        trained: Split digests below the limit that are trained on: documents that are too large to be held out.
        held_out: A split digest that is held out although it is above the limit; None: not needed.
        cut: The fraction of each document that is held out, at its beginning; 0: documents stay whole.
        min_cut: Characters of the shortest document that is cut.
        predefined: Whether the source assigns the splits itself.
        by_beginning: Whether the beginning of a conversation decides about its split, see `split_digest`.
    """

    limit: int = 0
    trained: tuple[int, ...] = ()
    held_out: int | None = None
    cut: float = 0.0
    min_cut: int = 0
    predefined: bool = False
    by_beginning: bool = False

    def holds_out(self, digest: int) -> bool:
        """Return whether whole documents of a split digest are held out."""
        return digest == self.held_out or (digest < self.limit and digest not in self.trained)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value; earlier versions had no `by_beginning`."""
        content = asdict(self)
        if not self.by_beginning:
            del content["by_beginning"]
        return content

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "SplitPlan":
        """Return the plan of a value of `to_json`."""
        return cls(**{**saved, "trained": tuple(saved["trained"])})


class CutText(NamedTuple):
    """A document that is cut once.

    Attributes:
        held_out: The beginning of the document.
        rest: The end of the document; the characters between the two belong to neither split.
    """

    held_out: str
    rest: str


def split_digest(document: Document, by_beginning: bool = False) -> int:
    """Return the digest that decides about the split of a document: that of its group, or its own.

    Args:
        document: The document.
        by_beginning: Whether conversations that begin with the same messages, up to the first of the assistant, are on
            one side.
    """
    if document.group:
        return _group_digest(document.group)
    if by_beginning and document.messages is not None:
        roles = [message.role for message in document.messages]
        first = roles.index("assistant") if "assistant" in roles else len(roles)
        return _group_digest(" ".join(message.content for message in document.messages[:first]))
    return document.digest


@lru_cache(maxsize=1024)  # a group may have thousands of documents
def _group_digest(group: str) -> int:
    return text_digest(group)


def make_plan(documents: Sequence[Document], fraction: float, complete: bool = True) -> SplitPlan:
    """Return the plan for a source.

    Args:
        documents: The documents of the sample; none is empty.
        fraction: The fraction of the text that is held out for validation.
        complete: Whether these are all documents of the source.

    Raises:
        UserError: There is too little text for both splits.
    """
    if any(document.split for document in documents):
        return SplitPlan(predefined=True)
    if any(document.messages is not None for document in documents):
        beginnings = {split_digest(document, True) for document in documents}
        # With few beginnings, such as one greeting for all, too much would be on one side.
        if len(beginnings) >= _FEW:
            return replace(_make_plan(documents, _group_sizes(documents, True), fraction, complete), by_beginning=True)
    return _make_plan(documents, _group_sizes(documents), fraction, complete)


def _make_plan(documents: Sequence[Document], sizes: dict[int, int], fraction: float, complete: bool) -> SplitPlan:
    """Return the plan for a source of documents with the sizes of their groups."""
    total = sum(sizes.values())
    is_few = len(sizes) < _FEW
    plan = _by_hash(sizes, fraction)
    if plan is None and (complete or not is_few):
        plan = _by_size(sizes, fraction)
    if plan is None and complete:
        plan = _one_document(sizes, fraction)
    if plan is None and (is_few or max(sizes.values()) > total / 2) and (complete or total > _LARGE * len(sizes)):
        plan = _cut(documents, fraction, max(_MIN_CUT, int(_SMALL * total)))
    if plan is None and not complete and len(sizes) > 1:
        plan = _by_hash_of_more(sizes, fraction)
    if plan is not None:
        return plan
    if len(sizes) < 2:
        different = len({document.digest for document in documents})
        size = f"{plural(total, 'character')} in {plural(different, 'document')}"
        if duplicates := len(documents) - different:
            size += f", {plural(duplicates, 'duplicate')} not counted"
        raise UserError(f"the text is too short to be split into training and validation: add more ({size})")
    if fraction > 0.5:
        raise UserError("all of the text would be held out for validation: add more, or lower data.validation_fraction")
    return SplitPlan(held_out=min(digest for digest, size in sizes.items() if size <= total / 2))


def _group_sizes(documents: Sequence[Document], by_beginning: bool = False) -> dict[int, int]:
    """Return the characters of the documents of each split digest; duplicates count once."""
    sizes: dict[int, int] = {}
    seen = set()
    for document in documents:
        digest = document.digest
        if digest not in seen:
            seen.add(digest)
            decides_alone = not (document.group or by_beginning)
            group = digest if decides_alone else split_digest(document, by_beginning)
            sizes[group] = sizes.get(group, 0) + document.size
    return sizes


def _by_hash(sizes: dict[int, int], fraction: float) -> SplitPlan | None:
    """Hold out all digests below the fraction, if that is neither far too much nor far too little text."""
    limit = int(fraction * _MAX_HASH)
    chosen = [size for digest, size in sizes.items() if digest < limit]
    share = sum(chosen) / sum(sizes.values())
    if not _LOWEST * fraction <= share <= _HIGHEST * fraction or len(chosen) > _most(sizes, fraction):
        return None
    return SplitPlan(limit)


def _by_size(sizes: dict[int, int], fraction: float) -> SplitPlan | None:
    """Hold out the lowest digests of documents that are not too large, until there is enough text."""
    wanted = fraction * sum(sizes.values())
    eligible = {digest: size for digest, size in sizes.items() if size <= wanted}
    held_out = 0
    for count, digest in enumerate(sorted(eligible), start=1):
        held_out += eligible[digest]
        if held_out >= wanted:
            if count > _most(eligible, fraction):
                return None
            limit = digest + 1
            return SplitPlan(limit, tuple(sorted(each for each in sizes if each < limit and each not in eligible)))
    return None


def _one_document(sizes: dict[int, int], fraction: float) -> SplitPlan | None:
    """Hold out the lowest digest of a document of about the right size."""
    total = sum(sizes.values())
    fitting = [d for d, size in sizes.items() if _LOWEST * fraction <= size / total <= _HIGHEST * fraction]
    return SplitPlan(held_out=min(fitting)) if fitting and len(sizes) > 1 else None


def _cut(documents: Sequence[Document], fraction: float, min_cut: int) -> SplitPlan | None:
    """Cut all documents that are not too short."""
    parts = (cut_document(each.text, fraction) for each in documents if can_be_cut(each, min_cut))
    return SplitPlan(cut=fraction, min_cut=min_cut) if any(part is not None for part in parts) else None


def _by_hash_of_more(sizes: dict[int, int], fraction: float) -> SplitPlan:
    """Hold out by the hash, since more documents follow; the sample has some of both splits, however small it is."""
    limit = int(fraction * _MAX_HASH)
    lowest, highest = min(sizes), max(sizes)
    return SplitPlan(limit, (highest,) if highest < limit else (), None if lowest < limit else lowest)


def _most(sizes: dict[int, int], fraction: float) -> float:
    """Return how many of the documents may be held out: some of each kind should be trained on."""
    return min(len(sizes) - 1, max(len(sizes) / 2, _HIGHEST * fraction * len(sizes)))


def can_be_cut(document: Document, min_cut: int) -> bool:
    """Return whether a document may be cut for the split; instructions and conversations never are."""
    return document.response is None and document.messages is None and len(document.text) >= min_cut


def cut_document(text: str, fraction: float, max_held_out: int = 0) -> CutText | None:
    """Cut a document into a beginning that is held out and an end that is trained on, with a gap between them.

    Cuts are made after a line break if there is one near the place, else after a space, else anywhere.

    Args:
        text: The text.
        fraction: The fraction that is held out.
        max_held_out: The largest number of characters that is held out; 0: no limit.

    Returns:
        The two parts; None if the text is too short.
    """
    size = largest_held_out(len(text), fraction)
    size = min(size, max_held_out or size)
    cut = _last_break(text, size // 2, size)
    gap = min(_MAX_GAP, len(text) // 50)
    rest = text[_next_break(text, cut + gap, cut + 2 * gap) :]
    if len(text) < _MIN_CUT or not text[:cut].strip() or not rest.strip():
        return None
    return CutText(text[:cut], rest)


def largest_held_out(size: int, fraction: float) -> int:
    """Return the largest number of characters that `cut_document` holds out of a text.

    Args:
        size: Characters of the text.
        fraction: The fraction that is held out.
    """
    return max(round(fraction * size), min(_MIN_HELD_OUT, size // 5))


def _last_break(text: str, start: int, stop: int) -> int:
    return text.rfind("\n", start, stop) + 1 or text.rfind(" ", start, stop) + 1 or stop


def _next_break(text: str, start: int, stop: int) -> int:
    return text.find("\n", start, stop) + 1 or text.find(" ", start, stop) + 1 or start
