"""Encode a part of a source, so that several processes or hosts share the work; `merge` makes the corpus of all parts.

A part encodes documents each by itself. What depends on several documents (duplicates, the split, limits) is decided by
`merge`, in the order of the source, as one process decides it: the corpus has the same bytes. `division.py` divides the
source.
"""

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.data.corpus.build import GROUP_SIZE, CorpusOptions
from slm_jax.data.corpus.cache import remove_folder
from slm_jax.data.corpus.conversations import accepted
from slm_jax.data.corpus.corpus import FORMAT
from slm_jax.data.corpus.division import Division, Group, Limits, file_owners
from slm_jax.data.corpus.encode import encode_groups
from slm_jax.data.corpus.encoded import TextEncoder, encoded_items
from slm_jax.data.corpus.marks import token_dtype
from slm_jax.data.corpus.part_files import (
    CUT,
    DOCUMENT,
    EMPTY,
    INVALID,
    OWN_SPLITS,
    PART_FORMAT,
    PIECE,
    RECORD_DTYPE,
    REPEATED,
    Part,
    PartState,
    chunk_files,
    json_checksum,
    read_groups,
)
from slm_jax.data.corpus.plan import SplitPlan, can_be_cut, cut_document, split_digest
from slm_jax.data.corpus.splitting import SourceSample, SplitText, is_empty, whole_text
from slm_jax.data.corpus.verification import checksum
from slm_jax.data.corpus.writing import write_array, write_json
from slm_jax.data.sources.documents import Document, InvalidRow, Source
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import is_partial
from slm_jax.utils.text_tokenizer import TextTokenizer, restores_text, save_tokenizer
from slm_jax.utils.tokenizer_files import tokenizer_file

logger = logging.getLogger(__name__)

CHUNK_SIZE = 1 << 22  # tokens after which a chunk is written; a part resumes after the last one


def part_version() -> list[int]:
    """Return what parts must have in common with the program that merges them."""
    return [PART_FORMAT, FORMAT, GROUP_SIZE]


def build_part(
    folder: Path,
    source: Source,
    tokenizer: TextTokenizer,
    options: CorpusOptions,
    part: Part,
    sample: SourceSample | None = None,
    workers: int = 0,
) -> PartState:
    """Encode a part of a source, or resume a part that was interrupted.

    Args:
        folder: The folder of the part.
        source: The source.
        tokenizer: The tokenizer.
        options: The options of the corpus.
        part: The part.
        sample: The sample of the source if it has been read.
        workers: Processes that encode; 0: one per core.

    Returns:
        The state of the complete part.

    Raises:
        UserError: The source cannot be read, has too little text, or has changed since the part was begun.
    """
    if sample is None:
        sample = SourceSample(source.read(), options.max_documents, options.max_tokens)
    documents = sample.documents()
    plan = sample.plan(options.validation_fraction)
    owners = file_owners(source, options, part.total)
    header = {
        "format": part_version(),
        "name": source.name,
        "source": source.describe(),
        "options": asdict(options),
        "tokenizer": tokenizer.fingerprint,
        "plan": json.loads(json.dumps(plan.to_json())),
        "sample_items": len(sample.items),
        "files": owners is not None,
    }
    if sample.has_conversations():
        header["marked"] = True
    state, seen = _resumed(folder, json.loads(json.dumps(header)), token_dtype(tokenizer, "marked" in header))
    if state.done:
        return state
    folder.mkdir(parents=True, exist_ok=True)
    for path in [path for path in folder.iterdir() if is_partial(path)]:  # of a process that was killed
        path.unlink()
    save_tokenizer(tokenizer, folder)
    division = Division(source, part, owners, Limits(options, plan, documents, tokenizer))
    _write_chunks(folder, state, division, _Drafts(plan, options, seen, tokenizer), tokenizer, workers)
    return state


def _resumed(folder: Path, header: dict[str, Any], dtype: np.dtype) -> tuple[PartState, set[int]]:
    """Return the state of a part on disk, and the digests of its documents; a new one if it cannot be used."""
    state = PartState.load(folder)
    seen: set[int] = set()
    if state is not None:
        try:
            if state.header != header:
                raise ValueError("it was made by another version")
            for group in read_groups(folder, state, dtype):
                kinds = group.records["kind"]
                seen.update(group.records["digest"][(kinds == DOCUMENT) | (kinds == CUT)].tolist())
            if state.groups and not state.done:
                logger.info("resuming after %s tokens of this part", f"{state.total('tokens'):,}")
            return state, seen
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): preparing this part from its beginning", folder, error)
            remove_folder(folder)
    return PartState(header), set()


def _write_chunks(
    folder: Path,
    state: PartState,
    division: Division,
    drafts: "_Drafts",
    tokenizer: TextTokenizer,
    workers: int,
) -> None:
    """Encode the groups of a part that are not on disk."""
    writer = _ChunkWriter(folder, state, tokenizer)
    groups = itertools.islice(division, state.groups, None)
    drafted = ((group, drafts.of(group)) for group in groups)
    pairs = ((each, encoded_items([text for draft in each[1] for text in draft.texts])) for each in drafted)
    with contextlib.closing(encode_groups(pairs, tokenizer, tokenizer_file(folder), workers)) as encoded:
        for (group, group_drafts), ids in encoded:
            if state.groups and group.version != state.version:
                raise UserError(
                    f"{state.header['name']} is at version {group.version} now, this part was begun with "
                    f"{state.version}: set --data.revision, or remove {folder} to begin it again"
                )
            state.version = group.version
            writer.add(group, group_drafts, iter(ids))
    state.done = True
    state.limited = division.limited
    state.version = division.version
    writer.write()


class _Draft(NamedTuple):
    """The record of an item before its texts are encoded.

    Attributes:
        kind: The kind of the record.
        values: Its fields `digest`, `split_digest`, `size`, `split`, `grouped` and `response`.
        texts: The texts to encode: one, or the pieces of a document that is cut.
        invalid: Reason and location of an invalid row.
        kept_text: The text of a document that the merge may cut elsewhere, if it cannot be decoded from the ids.
    """

    kind: int
    values: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    texts: tuple[SplitText, ...] = ()
    invalid: tuple[str, str] | None = None
    kept_text: str | None = None


class _Drafts:
    """Make the drafts of items; duplicates within the part are not encoded, since they are dropped in any case."""

    def __init__(self, plan: SplitPlan, options: CorpusOptions, seen: set[int], tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._plan = plan
        self._deduplicate = options.deduplicate
        self._seen = seen

    def of(self, group: Group) -> list[_Draft]:
        """Return the drafts of the items of a group."""
        return [self._draft(item) for item in accepted(group.items, self._tokenizer)]

    def _draft(self, item: Document | InvalidRow) -> _Draft:
        if isinstance(item, InvalidRow):
            return _Draft(INVALID, invalid=(item.reason, item.location))
        if is_empty(item):
            return _Draft(EMPTY)
        digest = item.digest
        by_beginning = self._plan.by_beginning
        group = split_digest(item, by_beginning) if item.group or by_beginning else digest
        is_whole = item.response is not None or item.messages is not None
        flags = (OWN_SPLITS.index(item.split), int(bool(item.group)), int(is_whole))
        values = (digest, group, item.size, *flags)
        if self._deduplicate and digest in self._seen:
            return _Draft(REPEATED, values)
        self._seen.add(digest)
        may_be_cut = self._plan.cut and can_be_cut(item, self._plan.min_cut)
        kept_text = item.text if may_be_cut and not restores_text(self._tokenizer) else None
        pieces = self._pieces(item, digest)
        if pieces:
            return _Draft(CUT, values, pieces, kept_text=kept_text)
        return _Draft(DOCUMENT, values, (whole_text(item, "train", digest),), kept_text=kept_text)

    def _pieces(self, document: Document, digest: int) -> tuple[SplitText, ...]:
        """Return the three pieces of a document that is cut for the split, none if it is not."""
        if not self._plan.cut or not can_be_cut(document, self._plan.min_cut):
            return ()
        parts = cut_document(document.text, self._plan.cut)
        if parts is None:
            return ()
        gap = document.text[len(parts.held_out) : len(document.text) - len(parts.rest)]
        return tuple(SplitText(text, None, "train", digest) for text in (parts.held_out, gap, parts.rest))


class _ChunkWriter:
    """Collect encoded groups, and write a chunk when there are enough."""

    def __init__(self, folder: Path, state: PartState, tokenizer: TextTokenizer):
        self._folder = folder
        self._state = state
        marked = bool(state.header.get("marked"))
        self._dtype = token_dtype(tokenizer, marked)
        self._encoder = TextEncoder(tokenizer, state.header["options"]["loss_on"], marked)
        self._clear()

    def _clear(self) -> None:
        self._records: list[tuple[int, ...]] = []
        self._ids: list[np.ndarray] = [np.zeros(0, self._dtype)]
        self._tokens = 0
        self._groups: list[list[Any]] = []
        self._invalid: list[tuple[str, str]] = []
        self._texts: list[tuple[int, str]] = []

    def add(self, group: Group, drafts: list[_Draft], ids: Iterator[np.ndarray]) -> None:
        """Add a group, and write a chunk if there are enough tokens.

        Args:
            group: The group.
            drafts: The drafts of its items.
            ids: The token ids of the `encoded_items` of their texts.
        """
        first = len(self._records)
        for draft in drafts:
            self._add_draft(draft, ids)
        self._groups.append([group.unit, len(self._records) - first, group.position])
        if self._tokens >= CHUNK_SIZE:
            self.write()

    def _add_draft(self, draft: _Draft, ids: Iterator[np.ndarray]) -> None:
        digest, group, size, *flags = draft.values
        if draft.invalid is not None:
            self._invalid.append(draft.invalid)
        if draft.kept_text is not None:
            self._texts.append((len(self._records), draft.kept_text))
        if draft.kind != DOCUMENT:
            self._records.append((digest, group, size, 0, 0, 0, 0, draft.kind, *flags))
        for text in draft.texts:
            encoded = self._encoder.encoded(text, ids)
            kind = DOCUMENT if draft.kind == DOCUMENT else PIECE
            sizes = (encoded.size, encoded.ids.size, encoded.num_bytes, encoded.prompt_size, encoded.rest)
            self._records.append((digest, group, *sizes, kind, *flags))
            self._ids.append(encoded.ids)
            self._tokens += encoded.ids.size

    def write(self) -> None:
        """Write what was collected, and the state of the part."""
        if self._groups:
            records = np.array(self._records, RECORD_DTYPE)
            tokens = np.concatenate(self._ids)
            content: dict[str, Any] = {"groups": self._groups, "invalid": self._invalid}
            if self._texts:
                content["texts"] = self._texts
            files = chunk_files(self._folder, len(self._state.chunks))
            write_array(files[0], records)
            write_array(files[1], tokens)
            write_json(files[2], content)
            sums = [checksum(records), checksum(tokens), json_checksum(content)]
            self._state.chunks.append({"records": records.size, "tokens": tokens.size, "sha256": sums})
            self._state.groups += len(self._groups)
        self._state.save(self._folder)
        self._clear()
