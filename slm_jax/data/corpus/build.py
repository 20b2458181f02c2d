"""From a source to a corpus on disk, in steps that survive a kill: the same command goes on after the last shard.

    read and split  ->  groups of texts  ->  token ids (all cores)  ->  shards  ->  manifest

Everything is a function of the source and the plan: a build that was killed anywhere ends with the same files.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.data.corpus.corpus import DOCUMENT, FORMAT, SPLITS, byte_table, checksum, shard_files
from slm_jax.data.corpus.encode import encode_groups
from slm_jax.data.corpus.splitting import Plan, SourceCounts, SourceSample, SplitAssigner, Text, make_plan, read_sample
from slm_jax.data.sources.documents import Document, InvalidRow, Reader, Source
from slm_jax.utils.errors import UserError
from tokenizer import HybridTokenizer

_GROUP = 1 << 20  # characters that are encoded at once
_NEWS = 10.0  # seconds between lines of progress
SHARD = 1 << 24  # tokens; after so many a shard is written, and what was done till then survives a kill

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a corpus depends on beside its source and tokenizer; in its manifest and in the key of its cache."""

    validation_fraction: float = 0.05
    deduplicate: bool = True
    max_documents: int = 0
    max_tokens: int = 0
    loss_on: str = "response"


class Group(NamedTuple):
    """Texts that are encoded together, what had been met by their end, and where their source goes on."""

    texts: list[Text]
    counts: dict[str, Any]
    position: Any
    version: str
    last: bool


@dataclass
class Progress:
    """What is on disk of a corpus that is being made; saved after each shard."""

    plan: Plan
    head: int = 0  # items; of what comes before their end no position is known
    position: Any = None
    version: str = ""
    counts: dict[str, Any] = field(default_factory=lambda: SourceCounts().to_json())
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    done: bool = False

    def save(self, folder: Path) -> None:
        """Atomically."""
        write_json(folder / "progress.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Progress | None":
        """That of a folder; None if nothing was begun there."""
        try:
            saved = json.loads((folder / "progress.json").read_text())
            return cls(**{**saved, "plan": Plan(**saved["plan"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def total(self, split: str, what: str) -> int:
        """Tokens, documents or bytes of a split."""
        return sum(shard[what] for shard in self.shards[split])


def build_corpus(
    folder: Path,
    source: Source,
    tokenizer: HybridTokenizer,
    options: Options,
    head: tuple[Reader, SourceSample, Iterator[Document | InvalidRow]] | None = None,
    workers: int = 0,
    say: Say = print,
) -> None:
    """Make the corpus of a source in `folder`, which appears when it is whole; goes on with what a kill has left.

    head: the source's reader with what was read of it. Raises UserError for a source that cannot be read.
    """
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        progress = _build_shards(partial, source, tokenizer, options, head, workers, say)
    except UserError:
        if not list(partial.glob("*.tokens.npy")):  # nothing to go on with
            shutil.rmtree(partial)
        raise
    manifest = {"format": FORMAT, "name": source.name, "source": source.describe(), "version": progress.version}
    manifest |= {"options": asdict(options), "tokenizer": tokenizer.fingerprint, "dtype": _dtype(tokenizer).name}
    manifest["counts"] = progress.counts
    for split in SPLITS:
        sums = {what: progress.total(split, what) for what in ("documents", "tokens", "bytes", "prompts")}
        manifest[split] = {**sums, "shards": progress.shards[split]}
    write_json(partial / "manifest.json", manifest)
    (partial / "progress.json").unlink(missing_ok=True)
    partial.rename(folder)


def _build_shards(
    partial: Path,
    source: Source,
    tokenizer: HybridTokenizer,
    options: Options,
    head: tuple[Reader, SourceSample, Iterator[Document | InvalidRow]] | None,
    workers: int,
    say: Say,
) -> Progress:
    """Write the shards that are missing, and the tokenizer."""
    progress = Progress.load(partial)
    saved = partial / "tokenizer.hybtok"
    if progress is None:
        if head is None:
            reader = source.read()
            head = (reader, *read_sample(reader, options.max_documents, options.max_tokens))
        reader, begun, rest = head
        progress = Progress(make_plan(begun.documents(), options.validation_fraction), len(begun.items))
        tokenizer.save(saved)
        progress.save(partial)
        items: Iterator[Document | InvalidRow] = itertools.chain(begun.items, rest)
    elif not progress.done:
        reader = source.read(progress.position)
        items = iter(reader)
        say(f"going on with {source.name} after {progress.total('train', 'tokens'):,} tokens")
    if not progress.done:
        writer = _Writer(partial, progress, tokenizer, options)
        groups = _groups(items, reader, _load_assigner(partial, progress, options), progress, options)
        pairs = ((group, _strings(group.texts)) for group in groups)
        news = _News(source.name, say)
        with contextlib.closing(encode_groups(pairs, tokenizer, saved, workers)) as encoded:
            for group, ids in encoded:
                writer.add(group, ids)
                news.tell(progress.total("train", "tokens") + writer.tokens["train"])
                if progress.done:  # the limit of tokens is reached
                    break
    for split in SPLITS:
        if not progress.shards[split]:
            limits = "raise data.max_documents or data.max_tokens"
            limited = options.max_documents or options.max_tokens
            raise UserError(f"{source.name}: no text is left for {split}: {limits if limited else 'add more'}")
    return progress


def _groups(
    items: Iterator[Document | InvalidRow],
    reader: Reader,
    assigner: SplitAssigner,
    progress: Progress,
    options: Options,
) -> Iterator[Group]:
    """The texts of items in groups. A group always ends where an item ends, and depends on no group before it."""
    counts = SourceCounts.from_json(progress.counts)
    head = progress.head if progress.position is None else 0
    kept = progress.total("train", "documents")
    texts: list[Text] = []
    size = 0
    for number, item in enumerate(items, start=1):
        if isinstance(item, InvalidRow):
            counts.note(item)
        else:
            for text in assigner.assign(item, counts):
                if text.split == "train" and options.max_documents and kept >= options.max_documents:
                    continue
                kept += text.split == "train"
                texts.append(text)
                size += len(text.text) + len(text.response or "")
        if options.max_documents and kept >= options.max_documents:
            break
        if size >= _GROUP:
            yield Group(texts, counts.to_json(), reader.position() if number >= head else None, reader.version, False)
            texts, size = [], 0
    yield Group(texts, counts.to_json(), None, reader.version, True)


def _load_assigner(folder: Path, progress: Progress, options: Options) -> SplitAssigner:
    """The sides with the texts of the shards on disk placed."""
    placed: dict[str, list[int]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for number in range(len(progress.shards[split])):
            placed[split] += np.load(folder / shard_files(split, number)[1])["digest"].tolist()
    trained = placed["train"] if options.deduplicate else ()
    return SplitAssigner(progress.plan, options.validation_fraction, options.deduplicate, trained, placed["validation"])


class _Writer:
    """Gathers encoded texts and writes shards."""

    def __init__(self, folder: Path, progress: Progress, tokenizer: HybridTokenizer, options: Options):
        self._folder, self._progress, self._options = folder, progress, options
        self._eos, self._dtype = tokenizer.token2id["<EOS>"], _dtype(tokenizer)
        self._table = byte_table(tokenizer)
        self._clear()

    def _clear(self) -> None:
        self._ids: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._rows: dict[str, list[tuple[int, ...]]] = {split: [] for split in SPLITS}
        self._bytes = dict.fromkeys(SPLITS, 0)
        self.tokens = dict.fromkeys(SPLITS, 0)

    def add(self, group: Group, ids: list[np.ndarray]) -> None:
        """Take a group with the ids of its `_strings`; writes a shard when there is enough, or when all has come."""
        left = iter(ids)
        before, limit = self._progress.total("train", "tokens"), self._options.max_tokens or math.inf
        for text in group.texts:
            first = next(left)
            response = None if text.response is None else next(left)
            if text.split == "validation" or before + self.tokens["train"] < limit:
                self._add(text, first, response)
        done = group.last or before + self.tokens["train"] >= limit
        if done or (group.position is not None and max(self.tokens.values()) >= SHARD):
            self._write(group, done)

    def _add(self, text: Text, first: np.ndarray, response: np.ndarray | None) -> None:
        masked = response is not None and self._options.loss_on == "response"
        content = first if response is None else np.concatenate([first, response])
        predicted = response if masked else content
        string = (text.response if masked else text.text + (text.response or "")) or ""
        size = len(string.encode("utf-8", "surrogatepass"))
        self._ids[text.split] += [content.astype(self._dtype), np.array([self._eos], self._dtype)]
        self.tokens[text.split] += content.size + 1
        rest = size - int(self._table[predicted].sum())
        prompt = first.size if masked else 0
        self._rows[text.split].append((self.tokens[text.split], text.digest, size, prompt, rest, 0))
        self._bytes[text.split] += size

    def _write(self, group: Group, done: bool) -> None:
        for split in SPLITS:
            if not self._rows[split]:
                continue
            tokens, documents = np.concatenate(self._ids[split]), np.array(self._rows[split], DOCUMENT)
            names = shard_files(split, len(self._progress.shards[split]))
            for name, array in zip(names, (tokens, documents), strict=True):
                write_array(self._folder / name, array)
            self._progress.shards[split].append(
                {
                    "tokens": tokens.size,
                    "documents": documents.size,
                    "bytes": self._bytes[split],
                    "prompts": int(np.count_nonzero(documents["prompt"])),
                    "tokens_sha256": checksum(tokens),
                    "documents_sha256": checksum(documents),
                }
            )
        self._progress.position, self._progress.version = group.position, group.version
        self._progress.counts, self._progress.done = group.counts, done
        self._progress.save(self._folder)
        self._clear()


def _strings(texts: list[Text]) -> list[str]:
    """What is encoded of texts, one behind another: an instruction's prompt and response apart."""
    return [part for text in texts for part in (text.text, text.response) if part is not None]


def _dtype(tokenizer: HybridTokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


class _News:
    """Lines of progress when it takes long."""

    def __init__(self, name: str, say: Say):
        self._name, self._say, self._began = name, say, time.monotonic()
        self._next, self._first = self._began + _NEWS, 0

    def tell(self, tokens: int) -> None:
        """tokens: how many there are by now."""
        now = time.monotonic()
        self._first = self._first or tokens
        if now >= self._next:
            rate = (tokens - self._first) / (now - self._began)
            self._say(f"{self._name}: {tokens / 1e6:,.1f} M tokens so far, {rate / 1e6:.2f} M a second")
            self._next = now + _NEWS


def write_json(path: Path, value: Any) -> None:
    """Atomically, and on the disk when it returns."""
    _write_file(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"))


def write_array(path: Path, array: np.ndarray) -> None:
    """As .npy; atomically, and on the disk when it returns."""
    _write_file(path, lambda file: np.save(file, array))


def _write_file(path: Path, write: Callable[[Any], Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
