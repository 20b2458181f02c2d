"""Build a corpus on disk from a source, resumable after the last shard that was written.

    read and split  ->  groups of texts  ->  token ids (all cores)  ->  shards  ->  manifest

Everything is a function of the source and the plan: a build that was killed at any instant ends with the same files.
"""

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.data.corpus.build_progress import BuildProgress
from slm_jax.data.corpus.conversations import accepted, template_digest
from slm_jax.data.corpus.corpus import CHAT_FORMAT, FORMAT, SPLITS, read_documents
from slm_jax.data.corpus.encode import encode_groups
from slm_jax.data.corpus.encoded import EncodedText, TextEncoder, encoded_items, end_of
from slm_jax.data.corpus.marks import num_turns, token_dtype
from slm_jax.data.corpus.splitting import Assignable, SourceCounts, SourceSample, SplitAssigner, SplitText
from slm_jax.data.corpus.stream import DOCUMENT_DTYPE
from slm_jax.data.corpus.writing import write_json, write_shard
from slm_jax.data.sources.documents import Document, InvalidRow, ReadState, Source
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import is_partial
from slm_jax.utils.text_tokenizer import TextTokenizer, save_tokenizer
from slm_jax.utils.tokenizer_files import tokenizer_file

logger = logging.getLogger(__name__)

GROUP_SIZE = 1 << 20  # characters that are encoded together
SHARD_SIZE = 1 << 24  # tokens after which a shard is written; a build resumes after the last one
_LOG_INTERVAL = 10.0  # seconds between log lines of a long build


@dataclass(frozen=True)
class CorpusOptions:
    """The options that a corpus depends on, besides its source and tokenizer; a part of manifest and cache key.

    Attributes:
        validation_fraction: See `data.validation_fraction`; the others likewise.
    """

    validation_fraction: float = 0.05
    deduplicate: bool = True
    max_documents: int = 0
    max_tokens: int = 0
    loss_on: str = "response"
    max_validation_characters: int = 0


class TextGroup(NamedTuple):
    """Texts that are encoded together, with the state of the build after them.

    Attributes:
        texts: The texts; those that a part has encoded need not be encoded again (see `merge`).
        counts: Statistics of the source up to here, see `SourceCounts.to_json`.
        position: The position of the reader; None within the sample, whose items have no positions.
        version: The version of the source.
        last: Whether the source ends here.
    """

    texts: list[SplitText | EncodedText]
    counts: dict[str, Any]
    position: Any
    version: str
    last: bool


def build_corpus(
    folder: Path,
    source: Source,
    tokenizer: TextTokenizer,
    options: CorpusOptions,
    sample: SourceSample | None = None,
    workers: int = 0,
) -> None:
    """Build the corpus of a source, or resume a build that was interrupted.

    Args:
        folder: The folder of the corpus, which appears when it is complete.
        source: The source.
        tokenizer: The tokenizer.
        options: Limits, and what is held out and predicted.
        sample: The sample of the source if it has been read.
        workers: Processes that encode; 0: one per core.

    Raises:
        UserError: The source cannot be read, or has too little text.
    """
    partial = folder.with_name(folder.name + ".partial")  # a fixed name, so that the next build finds it

    def build() -> BuildProgress:
        return _build_shards(partial, source, tokenizer, options, sample, workers)

    complete_corpus(folder, partial, source, tokenizer, options, build)


def complete_corpus(
    folder: Path,
    partial: Path,
    source: Source,
    tokenizer: TextTokenizer,
    options: CorpusOptions,
    build: Callable[[], BuildProgress],
) -> None:
    """Let the shards of a corpus be written, add the manifest, and give the folder its name.

    Args:
        folder: The folder of the corpus, which appears when it is complete.
        partial: The folder until then; created if missing.
        source: The source.
        tokenizer: The tokenizer.
        options: Limits, and what is held out and predicted.
        build: Writes the shards that are missing.

    Raises:
        UserError: The source cannot be read, or has too little text.
    """
    partial.mkdir(parents=True, exist_ok=True)
    for path in list(partial.iterdir()):
        if is_partial(path) or path.suffix == ".tmp":  # of a process that was killed; the latter of the tokenizer
            path.unlink()
    try:
        progress = build()
        for split in SPLITS:
            if not progress.shards[split]:
                is_limited = options.max_documents or options.max_tokens
                remedy = "raise data.max_documents or data.max_tokens" if is_limited else "add more"
                skipped = SourceCounts.from_json(progress.counts).skipped_text()
                raise UserError(f"{source.name}: no text is left for {split}: {remedy}{skipped}")
    except UserError:
        if not list(partial.glob("*.tokens.npy")):  # nothing to resume from
            shutil.rmtree(partial)
        raise
    manifest: dict[str, Any] = {
        "format": CHAT_FORMAT if progress.marked else FORMAT,
        "name": source.name,
        "source": source.describe(),
        "version": progress.version,
        "options": asdict(options),
        "tokenizer": tokenizer.fingerprint,
        "dtype": token_dtype(tokenizer, progress.marked).name,
        "counts": progress.counts,
    }
    if progress.marked:
        manifest["chat_template"] = template_digest(tokenizer)
    quantities = ("documents", "tokens", "bytes", "prompts", *(("turns",) if progress.marked else ()))
    for split in SPLITS:
        totals = {quantity: progress.total(split, quantity) for quantity in quantities}
        manifest[split] = {**totals, "shards": progress.shards[split]}
    write_json(partial / "manifest.json", manifest)
    (partial / "progress.json").unlink(missing_ok=True)
    partial.rename(folder)


def _build_shards(
    partial: Path,
    source: Source,
    tokenizer: TextTokenizer,
    options: CorpusOptions,
    sample: SourceSample | None,
    workers: int,
) -> BuildProgress:
    """Write the tokenizer and the shards that are missing."""
    progress = BuildProgress.load(partial)
    if progress is not None and not progress.done:
        try:
            for split in SPLITS:
                _read_digests(partial, progress, split)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): preparing %s from its beginning", partial, error, source.name)
            shutil.rmtree(partial)
            partial.mkdir()
            progress = None
    save_tokenizer(tokenizer, partial)
    if progress is None:
        if sample is None:
            sample = SourceSample(source.read(), options.max_documents, options.max_tokens)
        plan = sample.plan(options.validation_fraction)
        progress = BuildProgress(plan, len(sample.items), marked=sample.has_conversations())
        progress.save(partial)
        write_shards(partial, sample.all_items(), sample.reader, source.name, tokenizer, options, progress, workers)
    elif not progress.done:
        logger.info("resuming %s after %s tokens", source.name, f"{progress.total('train', 'tokens'):,}")
        reader = source.read(progress.position)
        write_shards(partial, iter(reader), reader, source.name, tokenizer, options, progress, workers)
    return progress


def write_shards(
    partial: Path,
    items: Iterator[Document | Assignable | InvalidRow],
    reader: ReadState,
    name: str,
    tokenizer: TextTokenizer,
    options: CorpusOptions,
    progress: BuildProgress,
    workers: int,
) -> None:
    """Encode items and write them as shards, until the source or a limit ends.

    Args:
        partial: The folder of the build.
        items: The items of the source after those of the shards on disk.
        reader: Their reader.
        name: The name of the source.
        tokenizer: The tokenizer, saved in the folder.
        options: Limits, and what is held out and predicted.
        progress: The state of the build, which is updated.
        workers: Processes that encode; 0: one per core.

    Raises:
        UserError: The source cannot be read, or a worker has died.
    """
    writer = _ShardWriter(partial, progress, tokenizer, options)
    items = accepted(items, tokenizer)
    groups = _groups(items, reader, _resume_assigner(partial, progress, options), progress, options)
    pairs = ((group, encoded_items(group.texts)) for group in groups)
    log = _ProgressLog(name)
    with contextlib.closing(encode_groups(pairs, tokenizer, tokenizer_file(partial), workers)) as encoded:
        for group, ids in encoded:
            writer.add(group, ids)
            log.update(progress.total("train", "tokens") + writer.tokens["train"])
            if progress.done:  # the limit of tokens is reached
                break


def _groups(
    items: Iterator[Document | Assignable | InvalidRow],
    reader: ReadState,
    assigner: SplitAssigner,
    progress: BuildProgress,
    options: CorpusOptions,
) -> Iterator[TextGroup]:
    """Yield the texts of items in groups; a group ends where an item ends, and is independent of earlier groups."""
    counts = SourceCounts.from_json(progress.counts)
    sample_items = progress.sample_items if progress.position is None else 0
    trained = progress.total("train", "documents")
    texts: list[SplitText | EncodedText] = []
    size = 0
    for number, item in enumerate(items, start=1):
        if isinstance(item, InvalidRow):
            counts.add_invalid(item)
        else:
            for text in assigner.assign(item, counts):
                if text.split == "train":
                    if options.max_documents and trained >= options.max_documents:
                        continue
                    trained += 1
                texts.append(text)
                size += text.size
        if options.max_documents and trained >= options.max_documents:
            break
        if size >= GROUP_SIZE:
            position = reader.position() if number >= sample_items else None
            yield TextGroup(texts, counts.to_json(), position, reader.version, False)
            texts = []
            size = 0
    yield TextGroup(texts, counts.to_json(), None, reader.version, True)


def _resume_assigner(folder: Path, progress: BuildProgress, options: CorpusOptions) -> SplitAssigner:
    """Return an assigner that knows the texts of the shards on disk."""
    return SplitAssigner(
        progress.plan,
        options.deduplicate,
        options.max_validation_characters,
        _read_digests(folder, progress, "train") if options.deduplicate else (),
        _read_digests(folder, progress, "validation"),
    )


def _read_digests(folder: Path, progress: BuildProgress, split: str) -> list[int]:
    """Return the digests of the texts of a split in the shards on disk.

    Raises:
        OSError, ValueError, KeyError, TypeError: A file, or its entry, is damaged.
    """
    digests: list[int] = []
    for number, entry in enumerate(progress.shards[split]):
        digests += read_documents(folder, split, number, entry)["digest"].tolist()
    return digests


class _ShardWriter:
    """Collect encoded texts, and write a shard of each split when there are enough.

    Attributes:
        tokens: Tokens collected since the last shard, by split.
    """

    def __init__(self, folder: Path, progress: BuildProgress, tokenizer: TextTokenizer, options: CorpusOptions):
        self._folder = folder
        self._progress = progress
        self._options = options
        self._eos = tokenizer.eos_id
        self._encoder = TextEncoder(tokenizer, options.loss_on, progress.marked)
        self._clear()

    def _clear(self) -> None:
        self._ids: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._documents: dict[str, list[tuple[int, ...]]] = {split: [] for split in SPLITS}
        self.tokens = dict.fromkeys(SPLITS, 0)

    def add(self, group: TextGroup, ids: list[np.ndarray]) -> None:
        """Add a group; writes a shard if there are enough tokens, or if the group is the last.

        Args:
            group: The texts.
            ids: The token ids of the `encoded_items` of the texts.
        """
        remaining = iter(ids)
        written = self._progress.total("train", "tokens")
        limit = self._options.max_tokens or math.inf
        for text in group.texts:
            encoded = text if isinstance(text, EncodedText) else self._encoder.encoded(text, remaining)
            if text.split == "validation" or written + self.tokens["train"] < limit:
                self._add_text(encoded)
        done = group.last or written + self.tokens["train"] >= limit
        if done or (group.position is not None and max(self.tokens.values()) >= SHARD_SIZE):
            self._write(group, done)

    def _add_text(self, text: EncodedText) -> None:
        split = text.split
        turns = num_turns(text.ids) if self._progress.marked else 0
        end = end_of(text, self._eos, self._progress.marked)
        self._ids[split] += [text.ids, end]
        self.tokens[split] += text.ids.size + end.size
        numbers = (text.digest, text.num_bytes, text.prompt_size, text.rest, turns)
        self._documents[split].append((self.tokens[split], *numbers))

    def _write(self, group: TextGroup, done: bool) -> None:
        for split in SPLITS:
            if not self._documents[split]:
                continue
            tokens = np.concatenate(self._ids[split])
            documents = np.array(self._documents[split], DOCUMENT_DTYPE)
            shards = self._progress.shards[split]
            shards.append(write_shard(self._folder, split, len(shards), tokens, documents, self._progress.marked))
        self._progress.position = group.position
        self._progress.version = group.version
        self._progress.counts = group.counts
        self._progress.done = done
        self._progress.save(self._folder)
        self._clear()


class _ProgressLog:
    """Log the progress of a long build at regular intervals."""

    def __init__(self, name: str):
        self._name = name
        self._start = time.monotonic()
        self._next = self._start + _LOG_INTERVAL
        self._first = 0  # tokens at the first update: those of a resumed build are not counted in the rate

    def update(self, tokens: int) -> None:
        """Log the number of tokens so far if it is time."""
        now = time.monotonic()
        self._first = self._first or tokens
        if now >= self._next:
            rate = (tokens - self._first) / (now - self._start)
            logger.info("%s: %s M tokens so far, %.2f M/s", self._name, f"{tokens / 1e6:,.1f}", rate / 1e6)
            self._next = now + _LOG_INTERVAL
