"""Merge the parts of a source into its corpus: decide as one process does, with texts that are encoded already."""

import contextlib
import itertools
import logging
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.data.corpus.build import CorpusOptions, complete_corpus, write_shards
from slm_jax.data.corpus.build_progress import BuildProgress
from slm_jax.data.corpus.cache import remove_folder
from slm_jax.data.corpus.division import file_owners
from slm_jax.data.corpus.encoded import EncodedText
from slm_jax.data.corpus.marks import token_dtype
from slm_jax.data.corpus.part_files import (
    CUT,
    EMPTY,
    INVALID,
    OWN_SPLITS,
    REPEATED,
    Part,
    PartState,
    StoredGroup,
    parts_folder,
    read_groups,
)
from slm_jax.data.corpus.parts import part_version
from slm_jax.data.corpus.plan import SplitPlan, largest_held_out
from slm_jax.data.corpus.splitting import Assignable, Cut, SplitText, cut_text
from slm_jax.data.sources.documents import Document, InvalidRow, Source, Split
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import is_locked
from slm_jax.utils.text_tokenizer import TextTokenizer, save_tokenizer

logger = logging.getLogger(__name__)


def complete_parts(corpus: Path) -> int:
    """Return the number of parts of a corpus if there is a set of which all are complete; else 0."""
    for folder in sorted(corpus.parent.glob(f"{corpus.name}.parts-*")):
        text = folder.name.rpartition("-")[2]
        count = int(text) if text.isdecimal() else 0
        states = [PartState.load(Part(number, count).folder(corpus)) for number in range(1, count + 1)]
        if count and all(state and state.done and state.header.get("format") == part_version() for state in states):
            return count
    return 0


def merge_parts(
    corpus: Path, source: Source, tokenizer: TextTokenizer, options: CorpusOptions, count: int, workers: int = 0
) -> None:
    """Make the corpus of a source from its parts, which are removed then.

    Args:
        corpus: The folder of the corpus, which appears when it is complete.
        source: The source.
        tokenizer: The tokenizer.
        options: The options of the corpus.
        count: The number of parts.
        workers: Processes that encode what has to be encoded once more; 0: one per core.

    Raises:
        UserError: A part is missing, incomplete, damaged, or of another text than the others.
    """
    states = _open_parts(corpus, source, tokenizer, options, count)
    partial = corpus.with_name(corpus.name + ".merge.partial")
    remove_folder(partial)
    reader = _MergingReader(corpus, states, source, tokenizer, file_owners(source, options, count))
    header = states[0].header

    def build() -> BuildProgress:
        save_tokenizer(tokenizer, partial)
        plan = SplitPlan.from_json(header["plan"])
        progress = BuildProgress(plan, header["sample_items"], marked=bool(header.get("marked")))
        write_shards(partial, iter(reader), reader, source.name, tokenizer, options, progress, workers)
        return progress

    logger.info("merging %d parts of %s", count, source.name)
    with contextlib.closing(reader):  # a network file system keeps files that are mapped
        complete_corpus(corpus, partial, source, tokenizer, options, build)
    remove_folder(parts_folder(corpus, count))
    remove_leftovers(corpus)


def remove_leftovers(corpus: Path) -> None:
    """Remove parts and builds of a complete corpus, which a process has left that was killed.

    Parts that a process is preparing stay.

    Args:
        corpus: The folder of the corpus, whose lock the caller holds.
    """
    for suffix in (".partial", ".merge.partial"):
        remove_folder(corpus.with_name(corpus.name + suffix))
    for folder in sorted(corpus.parent.glob(f"{corpus.name}.parts-*")):
        if not any(map(is_locked, folder.glob("*.lock"))):
            remove_folder(folder)


def _open_parts(
    corpus: Path, source: Source, tokenizer: TextTokenizer, options: CorpusOptions, count: int
) -> list[PartState]:
    """Return the states of all parts.

    Raises:
        UserError: A part is missing or incomplete, or parts differ in what they were made from.
    """
    states = []
    problems = []
    for number in range(1, count + 1):
        state = PartState.load(Part(number, count).folder(corpus))
        if state is None:
            problems.append(f"part {number} is missing")
        elif not state.done:
            problems.append(f"part {number} is not complete")
        else:
            states.append(state)
    if problems:
        hint = _other_parts(corpus, source, tokenizer, options, count)
        raise UserError(
            f"{source.name}: {', '.join(problems)} of {count}{hint}: run data prepare --part I/{count} with the same "
            "options for it (what it has is kept), then merge again"
        )
    for number, state in enumerate(states, start=1):
        if state.header.get("format") != part_version():
            raise UserError(
                f"{source.name}: part {number} of {count} was made by another version of this program: remove "
                f"{Part(number, count).folder(corpus)} and prepare that part again"
            )
        for name in ("header", "version"):
            if getattr(state, name) != getattr(states[0], name):
                raise UserError(
                    f"{source.name}: parts 1 and {number} of {count} were made of different text or by different "
                    f"versions of this program ({_difference(states[0], state)}): remove "
                    f"{Part(number, count).folder(corpus)} and prepare that part again"
                    + (", with --data.revision" if state.version != states[0].version else "")
                )
    return states


def _difference(first: PartState, second: PartState) -> str:
    names = [name for name in first.header if first.header[name] != second.header.get(name)]
    return ", ".join(names or [f"version {first.version} and {second.version}"])


def _other_parts(corpus: Path, source: Source, tokenizer: TextTokenizer, options: CorpusOptions, count: int) -> str:
    """Return a remark about parts in the cache that were made with other options, "" if there are none."""
    same = {"source": source.describe(), "options": asdict(options), "tokenizer": tokenizer.fingerprint}
    names = {"source": "text (files, sizes or times of modification)", "options": "options", "tokenizer": "tokenizer"}
    for folder in sorted(corpus.parent.glob("*.parts-*")):
        for state in filter(None, map(PartState.load, sorted(folder.iterdir()) if folder.is_dir() else ())):
            if state.header.get("name") != source.name or folder == parts_folder(corpus, count):
                continue
            different = [names[key] for key, value in same.items() if state.header.get(key) != value]
            if different:
                return f" (parts in {folder} were made with another {' and another '.join(different)})"
            return f" ({folder} has parts of {folder.name.rpartition('-')[2]})"
    return ""


class _MergingReader:
    """A `Reader` of what the parts have stored, in the order of the source; then of the source, beyond the parts."""

    def __init__(
        self,
        corpus: Path,
        states: list[PartState],
        source: Source,
        tokenizer: TextTokenizer,
        owners: list[int] | None,
    ):
        self.version = states[0].version
        self._corpus = corpus
        self._states = states
        self._source = source
        self._tokenizer = tokenizer
        self._owners = owners
        self._streams = [self._groups(number) for number in range(1, len(states) + 1)]
        self._next = [next(stream, None) for stream in self._streams]

    def close(self) -> None:
        """Close the files of the parts."""
        for stream in self._streams:
            stream.close()
        self._next.clear()

    def position(self) -> int:
        """Return a number: a merge that was interrupted begins again."""
        return 0

    def __iter__(self) -> Iterator[Document | Assignable | InvalidRow]:
        position: Any = None
        for unit in itertools.count():
            if self._owners is not None and unit == len(self._owners):
                break
            owner = self._owners[unit] if self._owners is not None else unit % len(self._states)
            group = self._next[owner]
            if group is None or group.unit != unit:
                break
            while group is not None and group.unit == unit:
                position = group.position
                yield from self._items(group)
                group = self._next[owner] = next(self._streams[owner], None)
        if any(state.limited for state in self._states):
            yield from self._remaining(position)
        elif any(group is not None for group in self._next):
            raise UserError(f"{self._corpus}: the parts do not fit together: remove them and prepare them again")

    def _remaining(self, position: Any) -> Iterator[Document | InvalidRow]:
        """Yield what the parts did not prepare, since it was expected to be beyond the limits."""
        logger.info("%s: the parts have less text than the limits allow: encoding the rest", self._source.name)
        yield from self._source.read(position)

    def _groups(self, number: int) -> Generator[StoredGroup, None, None]:
        folder = Part(number, len(self._states)).folder(self._corpus)
        try:
            marked = bool(self._states[number - 1].header.get("marked"))
            yield from read_groups(folder, self._states[number - 1], token_dtype(self._tokenizer, marked))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"part {number} of {len(self._states)} in {folder} is damaged ({error}): remove that folder, and "
                f"prepare the part again with --part {number}/{len(self._states)}"
            ) from None

    def _items(self, group: StoredGroup) -> Iterator[Assignable | InvalidRow]:
        invalid = iter(group.invalid)
        records = iter(_Record(*record) for record in group.records.tolist())
        first = 0
        index = 0
        for record in records:
            if record.kind == INVALID:
                yield InvalidRow(*next(invalid))
                index += 1
                continue
            stored = [record]
            if record.kind == CUT:
                stored += [next(records), next(records), next(records)]
            ends = list(itertools.accumulate((each.tokens for each in stored), initial=first))
            ids = [group.tokens[a:b] for a, b in itertools.pairwise(ends)]
            first = ends[-1]
            yield _StoredDocument(stored, ids, self._tokenizer, group.texts.get(index))
            index += len(stored)


@dataclass(frozen=True, slots=True)
class _Record:
    """A record; the attributes are the fields of RECORD_DTYPE."""

    digest: int
    split_digest: int
    size: int
    tokens: int
    bytes: int
    prompt: int
    rest: int
    kind: int
    split: int
    grouped: int
    response: int


@dataclass
class _StoredDocument:
    """An `Assignable` whose text is encoded.

    Attributes:
        records: Its record; of a document that is cut, those of the three pieces follow.
        ids: The ids of each record.
        tokenizer: The tokenizer.
        text: Its text, if the ids do not restore it and it may be needed.
    """

    records: list[_Record]
    ids: list[np.ndarray]
    tokenizer: TextTokenizer
    text: str | None
    digest: int = field(init=False)

    def __post_init__(self) -> None:
        self.digest = self.records[0].digest

    @property
    def is_empty(self) -> bool:
        """True if it has nothing to predict."""
        return self.records[0].kind == EMPTY

    @property
    def split_digest(self) -> int:
        """Its `split_digest`."""
        return self.records[0].split_digest

    @property
    def has_group(self) -> bool:
        """True if it belongs to a group."""
        return bool(self.records[0].grouped)

    @property
    def own_split(self) -> Split | None:
        """The split that the source assigns."""
        return OWN_SPLITS[self.records[0].split]  # type: ignore[return-value]

    def whole(self, split: Split) -> EncodedText | SplitText:
        """Return the text of a split; it has to be encoded again if the part expected that it is cut."""
        if self.records[0].kind == CUT:
            return SplitText(self._text(), None, split, self.digest)
        return self._encoded(0, split)

    def cut(self, plan: SplitPlan, max_held_out: int) -> Cut | None:
        """Return the two parts, to be encoded again if the limit of held-out text shortens them."""
        record = self.records[0]
        if record.response or record.size < plan.min_cut:
            return None
        if record.kind == CUT and not 0 < max_held_out < largest_held_out(record.size, plan.cut):
            return Cut(self._encoded(1, "validation", False), self._encoded(3, "train"), self.records[2].size)
        if record.kind != CUT and not max_held_out:
            return None
        return cut_text(self._text(), self.digest, plan, max_held_out)

    def _encoded(self, index: int, split: Split, ends: bool = True) -> EncodedText:
        record = self.records[index]
        assert record.kind != REPEATED  # a document that is dropped
        return EncodedText(
            split, self.digest, ends, record.size, self.ids[index], record.bytes, record.prompt, record.rest
        )

    def _text(self) -> str:
        """Return the text: what is kept, or what the ids encode without loss."""
        if self.text is not None:
            return self.text
        text = "".join(self.tokenizer.decode(ids.tolist()) for ids in self.ids if ids.size)
        assert len(text) == self.records[0].size
        return text
