"""The division of a source into parts that several processes or hosts encode.

The source is divided by files if there are enough of them, else into groups of about a million characters, which are
dealt out in turn; then each part reads all of the text, and encodes its groups.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from slm_jax.data.corpus.build import GROUP_SIZE, CorpusOptions
from slm_jax.data.corpus.part_files import Part
from slm_jax.data.corpus.plan import SplitPlan
from slm_jax.data.corpus.splitting import is_empty
from slm_jax.data.sources.documents import Document, InvalidRow, Source
from slm_jax.data.sources.file_source import FileSource
from slm_jax.utils.text_tokenizer import TextTokenizer

_FILES_PER_PART = 2  # with fewer files than this, groups are dealt out instead
_RESERVE = 1.25  # of a limit of documents or tokens is prepared; if it is not enough, `merge` encodes the rest
_RATE_SAMPLE = 1 << 18  # characters that the number of tokens per character is estimated from


def file_owners(source: Source, options: CorpusOptions, count: int) -> list[int] | None:
    """Return the part of each file of a source, from 0; None if groups are dealt out instead.

    Large files are dealt first, each to the part with the least so far. With a limit of documents or tokens only the
    beginning of the source is needed, which all parts read.
    """
    if not isinstance(source, FileSource) or len(source.files) < _FILES_PER_PART * count:
        return None
    if options.max_documents or options.max_tokens:
        return None
    sizes = [path.stat().st_size for path in source.files]
    loads = [0] * count
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda each: (-sizes[each], each)):
        owner = loads.index(min(loads))
        owners[index] = owner
        loads[owner] += sizes[index]
    return owners


class Limits:
    """An estimate of when enough of a source was read for the limits of documents and tokens."""

    def __init__(
        self, options: CorpusOptions, plan: SplitPlan, documents: Sequence[Document], tokenizer: TextTokenizer
    ):
        fraction = 0.0 if plan.predefined else max(options.validation_fraction, plan.cut)
        share = _RESERVE / max(1.0 - fraction, 0.01)
        self._documents = options.max_documents * share
        self._characters = 0.0
        if options.max_tokens:
            texts = []
            size = 0
            for document in documents:
                texts.append((document.text or "\n".join(document.strings))[:_RATE_SAMPLE])
                size += len(texts[-1])
                if size >= _RATE_SAMPLE:
                    break
            tokens = sum(ids.size + 1 for ids in tokenizer.encode_arrays(texts))
            self._characters = options.max_tokens * share * size / tokens

    def reached(self, documents: int, characters: int) -> bool:
        """Return whether this many documents or characters, without the source's own validation text, are enough."""
        return bool(
            (self._documents and documents >= self._documents) or (self._characters and characters >= self._characters)
        )


class Group(NamedTuple):
    """A group of a part before it is encoded; the attributes are those of StoredGroup."""

    unit: int
    position: Any
    version: str
    items: list[Document | InvalidRow]


class Division:
    """The groups of a part in the order of the source; it can be iterated once.

    Attributes:
        limited: After the iteration: whether it ended at a limit.
        version: After the iteration: the version of the source.
    """

    def __init__(self, source: Source, part: Part, owners: list[int] | None, limits: Limits):
        self._source = source
        self._part = part
        self._owners = owners
        self._limits = limits
        self.limited = False
        self.version = ""

    def __iter__(self) -> Iterator[Group]:
        return self._groups() if self._owners is None else self._groups_of_files(self._owners)

    def _groups_of_files(self, owners: list[int]) -> Iterator[Group]:
        assert isinstance(self._source, FileSource)
        for index, owner in enumerate(owners):
            if owner != self._part.number - 1:
                continue
            items: list[Document | InvalidRow] = []
            size = 0
            for item in self._source.documents(self._source.files[index]):
                items.append(item)
                size += _size(item)
                if size >= GROUP_SIZE:
                    yield Group(index, None, "", items)
                    items = []
                    size = 0
            yield Group(index, None, "", items)

    def _groups(self) -> Iterator[Group]:
        reader = self._source.read()
        items: list[Document | InvalidRow] = []
        unit = size = documents = characters = 0
        for item in reader:
            is_own = unit % self._part.total == self._part.number - 1
            if is_own:
                items.append(item)
            size += _size(item)
            if isinstance(item, Document) and item.split != "validation" and not is_empty(item):
                documents += 1
                characters += _size(item)
            if size >= GROUP_SIZE:
                self.version = reader.version
                if is_own:
                    yield Group(unit, reader.position(), reader.version, items)
                    items = []
                unit += 1
                size = 0
                if self._limits.reached(documents, characters):
                    self.limited = True
                    return
        self.version = reader.version
        if unit % self._part.total == self._part.number - 1:
            yield Group(unit, None, reader.version, items)


def _size(item: Document | InvalidRow) -> int:
    """Return the characters of an item; at least 1, so that a group of empty items ends as well."""
    return 1 + item.size if isinstance(item, Document) else 1
