"""The preference pairs of a run: token ids of chosen and rejected conversations, in the folder `pairs` of the run.

The corpus of the run holds the chosen conversations, as that of any conversations: which of them are held out, and what
other programs read, is decided there. This folder adds the rejected ones. It is made from the same source, pair by
pair of the documents that the corpus has, and appears complete or not at all:

    pairs/manifest.json    number of pairs of each split, fingerprint, CRC-32 of the arrays
          tokens.npy       uint32: the ids of all sequences; the top bit marks those that are not predicted
          ends.npy         int64 [2 P]: where each sequence ends: chosen, rejected, chosen, …; training pairs come first
"""

import json
import logging
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.chat.messages import EncodedChat, Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.config.schema import Config
from slm_jax.data.corpus.conversations import accepted
from slm_jax.data.corpus.corpus import SPLITS, Corpus
from slm_jax.data.corpus.marks import is_marked, marked_ids, to_stored, without_marks
from slm_jax.data.corpus.splitting import ReadDocument
from slm_jax.data.corpus.writing import write_array, write_json
from slm_jax.data.sources.documents import Document
from slm_jax.data.sources.preferences import shared_messages
from slm_jax.data.sources.registry import make_sources
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural
from slm_jax.utils.text_tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

_FORMAT = 1
_ARRAYS = ("tokens", "ends")
_DTYPE = np.dtype(np.uint32)


@dataclass(frozen=True)
class Pairs:
    """Preference pairs, those of training first.

    Attributes:
        tokens: Stored ids of all sequences.
        ends: Where each sequence ends, int64 [2 P].
        train: Number of training pairs; the rest is held out.
        fingerprint: Changes with the pairs and their order.
    """

    tokens: np.ndarray
    ends: np.ndarray
    train: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ends) // 2

    def sizes(self) -> np.ndarray:
        """Return the tokens of the sequences of each pair, int64 [P, 2]."""
        return np.diff(self.ends, prepend=0).reshape(-1, 2)

    def sequence(self, pair: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a sequence, uint32 [T], and which of them are predicted, bool [T].

        Args:
            pair: The pair.
            side: 0: chosen; 1: rejected.
        """
        index = 2 * pair + side
        stored = self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]
        return without_marks(stored), ~is_marked(stored)


def open_pairs(folder: Path, config: Config, corpus: Corpus, tokenizer: TextTokenizer) -> Pairs:
    """Open the pairs of a run; make them if they are missing or damaged.

    Args:
        folder: The folder `pairs` of the run.
        config: The options of the data.
        corpus: The corpus of the run.
        tokenizer: Its tokenizer.

    Raises:
        UserError: The source has no pairs, or its text has changed.
    """
    if folder.is_dir():
        try:
            return _read(folder, corpus)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): making the pairs again from their source", folder, error)
            shutil.rmtree(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write(partial, config, corpus, tokenizer)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _read(folder, corpus)


def _read(folder: Path, corpus: Corpus) -> Pairs:
    """Read and verify the pairs.

    Raises:
        OSError, ValueError, KeyError, TypeError: They are damaged, or of another corpus.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["format"] != _FORMAT:
        raise ValueError(f"its format is {manifest['format']!r}, not {_FORMAT}")
    if manifest["corpus"] != corpus.fingerprint:
        raise ValueError("it is of another corpus")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
    for name, array in arrays.items():
        if zlib.crc32(np.ascontiguousarray(array).data) != manifest["crc32"][name]:
            raise ValueError(f"{name}.npy differs from its checksum")
    return Pairs(arrays["tokens"], arrays["ends"], manifest["train"], manifest["fingerprint"])


def _write(folder: Path, config: Config, corpus: Corpus, tokenizer: TextTokenizer) -> None:
    """Write the pairs of the documents of a corpus."""
    sequences: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    # With data.deduplicate false a corpus has some documents several times, and each time with a pair of its own.
    missing = {split: Counter(getattr(corpus, split).documents["digest"].tolist()) for split in SPLITS}
    left = sum(map(Counter.total, missing.values()))
    template = ChatTemplate.of(tokenizer)
    refused = 0
    for document in _documents(config, tokenizer):
        digest = ReadDocument(document).digest
        split = next((split for split in SPLITS if missing[split][digest]), None)
        if split is None:  # a duplicate, or beyond a limit
            continue
        missing[split][digest] -= 1
        left -= 1
        try:
            sequences[split] += _encoded(template, document)
        except UserError:  # the template of a published model rejects the other conversation
            refused += 1
        if not left:  # with a limit, the rest of the source may be far longer than what the run uses
            break
    if refused:
        logger.warning("%s are left out: the chat template rejects a conversation", plural(refused, "pair"))
    _require_complete(config, sequences, left)
    ordered = [ids for split in SPLITS for ids in sequences[split]]
    tokens = np.concatenate(ordered)
    ends = np.cumsum([ids.size for ids in ordered], dtype=np.int64)
    checksums = {}
    for name, array in zip(_ARRAYS, (tokens, ends), strict=True):
        write_array(folder / f"{name}.npy", array)
        checksums[name] = zlib.crc32(np.ascontiguousarray(array).data)
    counts = {split: len(sequences[split]) // 2 for split in SPLITS}
    fingerprint = f"{checksums['tokens']:08x}{checksums['ends']:08x}"
    content: dict[str, Any] = {"format": _FORMAT, "corpus": corpus.fingerprint, "fingerprint": fingerprint, **counts}
    write_json(folder / "manifest.json", {**content, "crc32": checksums})


def has_pairs(config: Config, tokenizer: TextTokenizer) -> bool:
    """Return whether the source of a config has a preference pair; reads it up to the first."""
    return next(_documents(config, tokenizer), None) is not None


def _documents(config: Config, tokenizer: TextTokenizer) -> Iterator[Document]:
    """Yield the documents of the source that have a rejected conversation."""
    ((source, _),) = make_sources(config.data)
    for item in accepted(iter(source.read()), tokenizer):
        if isinstance(item, Document) and item.messages is not None and item.rejected is not None:
            yield item


def _require_complete(config: Config, sequences: dict[str, list[np.ndarray]], missing: int) -> None:
    """Check that there is a pair for each document of the corpus.

    Raises:
        UserError: There is none for some.
    """
    name = config.data.source if config.data.source != "files" else ", ".join(config.data.files)
    if not sequences["train"] or not sequences["validation"]:
        raise UserError(
            f"{name} has no preference pairs to train on: train.objective dpo needs rows with columns chosen and "
            "rejected, lists of messages, or texts with a column prompt"
        )
    if missing:
        raise UserError(
            f"{plural(missing, 'document')} of the corpus have no preference pair in {name}: it has rows of other "
            "kinds, or has changed since the run was started. Restore it, or start another --run"
        )


def _encoded(template: ChatTemplate, document: Document) -> list[np.ndarray]:
    """Return the stored ids of the chosen and of the rejected conversation of a document."""
    assert document.messages is not None
    assert document.rejected is not None
    shared = document.messages[: shared_messages(document.messages, document.rejected)]
    turns = sum(message.role == "assistant" for message in shared)
    return [_response_only(template, messages, turns) for messages in (document.messages, document.rejected)]


def _response_only(template: ChatTemplate, messages: tuple[Message, ...], turns: int) -> np.ndarray:
    """Return the stored ids of a conversation in which the first turns of the assistant are not predicted."""
    chat = template.encode(messages)
    begins = chat.predicted & ~np.append(False, chat.predicted[:-1])
    predicted = chat.predicted & (np.cumsum(begins) > turns)
    return to_stored(marked_ids(EncodedChat(chat.ids, predicted)), _DTYPE)
