"""Keep held-out documents of one corpus out of the training text of others, and the reverse.

Each source is split by itself. Documents of several corpora (sources of a mixture, a run and those that its weights
come from) are compared by the digests that every corpus stores; those on different sides are left out of a copy, which
shares the files of all other shards.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.data.corpus.cache import link_or_copy, remove_folder
from slm_jax.data.corpus.corpus import CHAT_FORMAT, SPLITS, open_array, read_documents, read_manifest, shard_files
from slm_jax.data.corpus.verification import checksum
from slm_jax.data.corpus.writing import write_json, write_shard
from slm_jax.utils.errors import UserError
from slm_jax.utils.tokenizer_files import tokenizer_file


@dataclass(frozen=True)
class CorpusDigests:
    """The digests of the documents of a corpus.

    Attributes:
        train: Of the training documents, uint64 [D].
        validation: Of the held-out documents, uint64 [D].
        cuts: Of documents that were cut for the split, the bytes of both parts.
    """

    train: np.ndarray
    validation: np.ndarray
    cuts: dict[int, tuple[int, int]]


class Exclusion(NamedTuple):
    """The documents to leave out of a corpus.

    Attributes:
        train: Digests of training documents that are held out elsewhere, uint64, sorted.
        validation: Digests of held-out documents that the weights were trained on, uint64, sorted.
        all_seen: Whether these are all held-out documents, which are kept then.
    """

    train: np.ndarray
    validation: np.ndarray
    all_seen: bool = False

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to leave out, and nothing to state."""
        return not (self.train.size or self.validation.size or self.all_seen)


@contextlib.contextmanager
def trained_corpus_errors() -> Iterator[None]:
    """Report damage to the corpus of a run that the weights come from, which cannot be built again without that run.

    Raises:
        UserError: The corpus cannot be read.
    """
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{str(error).partition(': remove')[0]}. It is the text that the initial weights were trained on, and "
            "held-out documents are compared with it: restore it from a backup, or remove it to start without this "
            "comparison"
        ) from None


def read_digests(folder: Path) -> list[CorpusDigests]:
    """Read the digests of a corpus, or of each corpus of a mixture.

    Raises:
        UserError: The corpus cannot be read.
    """
    manifest = read_manifest(folder)
    if "mix" in manifest:
        return [digests for entry in manifest["mix"] for digests in read_digests(folder / entry["folder"])]
    documents = {split: _documents(folder, split, manifest) for split in SPLITS}
    train, validation = (documents[split]["digest"] for split in SPLITS)
    sizes = [dict(zip(part["digest"].tolist(), part["bytes"].tolist(), strict=True)) for part in documents.values()]
    cuts = {each: (sizes[0][each], sizes[1][each]) for each in np.intersect1d(train, validation).tolist()}
    return [CorpusDigests(train, validation, cuts)]


def _documents(folder: Path, split: str, manifest: dict[str, Any]) -> np.ndarray:
    with _reading(folder):
        shards = enumerate(manifest[split]["shards"])
        return np.concatenate([read_documents(folder, split, number, entry) for number, entry in shards])


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Report what comes of reading a damaged corpus.

    Raises:
        UserError: It is damaged.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the corpus in {folder} is damaged ({error}): remove that folder to build it again") from None


def find_exclusions(corpora: Sequence[CorpusDigests], trained: Sequence[CorpusDigests] = ()) -> list[Exclusion]:
    """Return what has to be left out of corpora that are trained on together.

    A document that one of them, or one that was trained on before, holds out is left out of the training text of the
    others. A held-out document that was trained on before is left out of the held-out text, unless nothing would be
    left.

    Args:
        corpora: The corpora of a run.
        trained: The corpora of the runs that its weights come from.
    """
    exclusions = []
    for index, corpus in enumerate(corpora):
        others = [other for number, other in enumerate(corpora) if number != index]
        seen = _conflicts(corpus, corpus.validation, [(other, other.train) for other in trained])
        all_seen = bool(seen.size) and bool(np.isin(corpus.validation, seen).all())
        held_out = _conflicts(corpus, corpus.train, [(other, other.validation) for other in (*others, *trained)])
        exclusions.append(Exclusion(held_out, seen[:0] if all_seen else seen, all_seen))
    return exclusions


def _conflicts(
    corpus: CorpusDigests, digests: np.ndarray, others: Sequence[tuple[CorpusDigests, np.ndarray]]
) -> np.ndarray:
    """Return those digests that other corpora have on the other side, sorted.

    The parts of a document that was cut at the same place in both are no conflict.
    """
    conflicts = [np.zeros(0, np.uint64)]
    for other, other_digests in others:
        common = np.intersect1d(digests, other_digests)
        same_cut = [each for each, sizes in corpus.cuts.items() if other.cuts.get(each) == sizes]
        conflicts.append(np.setdiff1d(common, np.array(same_cut, np.uint64)))
    return np.unique(np.concatenate(conflicts))


def copy_without(source: Path, target: Path, exclusion: Exclusion) -> None:
    """Copy a corpus without some documents; shards that have none of them are linked.

    Args:
        source: The folder of the corpus.
        target: The folder of the copy, which appears when it is complete.
        exclusion: The documents to leave out. Their numbers are in the manifest of the copy, in `excluded`.

    Raises:
        UserError: No training text would be left.
    """
    manifest = read_manifest(source)
    partial = target.with_name(target.name + ".partial")
    remove_folder(partial)
    partial.mkdir(parents=True)
    tokenizer = tokenizer_file(source)
    link_or_copy(tokenizer, partial / tokenizer.name)
    excluded: dict[str, Any] = {"all_seen": exclusion.all_seen}
    for split, digests in zip(SPLITS, (exclusion.train, exclusion.validation), strict=True):
        before = manifest[split]["documents"]
        shards = _copy_shards(source, partial, split, manifest, digests)
        if not shards:
            shutil.rmtree(partial)
            raise UserError(
                f"{manifest['name']}: all of its training text is held out by another source, or by the run that the "
                "weights come from: leave this source out"
            )
        quantities = [name for name in manifest[split] if name != "shards"]
        totals = {quantity: sum(shard[quantity] for shard in shards) for quantity in quantities}
        manifest[split] = {**totals, "shards": shards}
        excluded[split] = before - totals["documents"]
    write_json(partial / "manifest.json", {**manifest, "excluded": excluded})
    partial.rename(target)


def _copy_shards(
    source: Path, target: Path, split: str, manifest: dict[str, Any], digests: np.ndarray
) -> list[dict[str, Any]]:
    """Copy the shards of a split without some documents; return the entries of the manifest."""
    shards: list[dict[str, Any]] = []
    for number, entry in enumerate(manifest[split]["shards"]):
        files = [source / name for name in shard_files(split, number)]
        with _reading(source):
            documents = np.array(read_documents(source, split, number, entry))
        kept = ~np.isin(documents["digest"], digests)
        if kept.all():
            for file, name in zip(files, shard_files(split, len(shards)), strict=True):
                link_or_copy(file, target / name)
            shards.append(entry)
        elif kept.any():
            ends = documents["end"]
            lengths = np.diff(ends, prepend=0)
            with _reading(source):
                tokens = open_array(files[0], np.dtype(manifest["dtype"]), entry["tokens"])
                if checksum(tokens) != entry["tokens_sha256"]:
                    raise ValueError(f"{files[0].name}: its checksum is not that of the manifest")
            documents = documents[kept]
            documents["end"] = np.cumsum(lengths[kept])
            is_chat = manifest["format"] == CHAT_FORMAT
            kept_tokens = tokens[np.repeat(kept, lengths)]
            shards.append(write_shard(target, split, len(shards), kept_tokens, documents, is_chat))
    return shards


def exclusion_key(source: Path, exclusion: Exclusion) -> list[Any]:
    """Return a JSON value that identifies a copy without some documents."""
    digests = [json.dumps(part.tolist()) for part in (exclusion.train, exclusion.validation)]
    return [source.name, *digests, exclusion.all_seen]
