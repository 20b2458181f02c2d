"""Tokenized text on disk: shards of token ids that are memory-mapped, never read as a whole.

A corpus folder holds `manifest.json`, the tokenizer, and numbered shards of the splits `train` and `validation`:
`train-00000.tokens.npy` are the ids (uint16, or uint32 for more than 65,536) of its documents one after another, each
followed by <EOS> (unless it was cut for the split and its end is in the other one); `train-00000.documents.npy` has an
entry of DOCUMENT_DTYPE for each document. The folder appears under its name only when it is complete (see `build`). The
folder of a mixture holds several corpora and a manifest that lists them with their weights.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.data.corpus.stream import DOCUMENT_DTYPE, Shard, TokenStream, byte_table, heads
from slm_jax.utils.errors import UserError
from tokenizer import HybridTokenizer

FORMAT = 3
# Format 2 has the same files, but long documents were cut into parts for the split. Corpora in runs are still read;
# those in the cache are made again.
READABLE = (2, FORMAT)
SPLITS = ("train", "validation")
# Bytes; the checksums of corpora up to this size are verified whenever they are opened, in a tenth of a second.
_VERIFIED = 64 << 20


@dataclass(frozen=True)
class MixturePart:
    """One corpus of a mixture.

    Attributes:
        train: Its training split.
        weight: Its share of the training batches, not normalized.
        name: The name of its source.
    """

    train: TokenStream
    weight: float
    name: str


class HeldOut(NamedTuple):
    """Held-out text of one source.

    Attributes:
        name: The name of the source.
        stream: The text.
    """

    name: str
    stream: TokenStream


@dataclass(frozen=True)
class Corpus:
    """An opened corpus, or a mixture of several.

    Attributes:
        train: The training split; of a mixture, all parts one after another.
        validation: The validation split, likewise.
        parts: The corpora of the mixture; one if it is none.
        fingerprint: A hash of the content, and of the weights of a mixture.
        source: `Source.describe` of the source; of a mixture, a list of these.
        manifests: The manifest of each part.
    """

    train: TokenStream
    validation: TokenStream
    parts: tuple[MixturePart, ...]
    fingerprint: str
    source: Any
    manifests: tuple[dict[str, Any], ...]

    def held_out(self, max_tokens: int = 0) -> list[HeldOut]:
        """Return the held-out text of each part.

        Args:
            max_tokens: Divided among the parts in proportion to their held-out text, at least one document of each,
                so that the parts weigh as much as without a limit; 0: all.
        """
        streams = []
        first = 0
        for manifest in self.manifests:
            count = len(manifest["validation"]["shards"])
            streams.append(self.validation.part(first, first + count))
            first += count
        names = [part.name for part in self.parts]
        return [HeldOut(*pair) for pair in zip(names, heads(streams, max_tokens), strict=True)]


def checksum(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's content."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def shard_files(split: str, number: int) -> tuple[str, str]:
    """Return the names of a shard's two files, tokens and documents."""
    return f"{split}-{number:05d}.tokens.npy", f"{split}-{number:05d}.documents.npy"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a corpus folder.

    Raises:
        UserError: It is damaged, or of another version of the format.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        number = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"manifest.json: {error}") from None
    if number not in READABLE:
        raise UserError(
            f"the corpus in {folder} has format {number}, this version reads {' and '.join(map(str, READABLE))}: "
            "remove that folder to build it again"
        )
    return manifest


def open_corpus(folder: Path, tokenizer: HybridTokenizer, verify: bool | None = None) -> Corpus:
    """Open the corpus in a folder, memory-mapped.

    Args:
        folder: The folder of a corpus or a mixture.
        tokenizer: The tokenizer it was built with.
        verify: Whether to compare every checksum; None: only if the corpus is small. Sizes are always compared.

    Raises:
        UserError: The corpus is damaged (names the shard), or was built with another tokenizer.
    """
    manifest = read_manifest(folder)
    if "mix" in manifest:
        return _open_mixture(folder, manifest, tokenizer, verify)
    if manifest["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"the corpus in {folder} was built with another tokenizer: remove that folder to build it again"
        )
    table = byte_table(tokenizer)
    train, validation = (TokenStream(_open_shards(folder, split, manifest, verify), table) for split in SPLITS)
    checksums = [
        [shard["tokens_sha256"], shard["documents_sha256"]] for split in SPLITS for shard in manifest[split]["shards"]
    ]
    fingerprint = _hash([manifest["format"], manifest["tokenizer"], checksums])
    part = MixturePart(train, 1.0, manifest["name"])
    return Corpus(train, validation, (part,), fingerprint, manifest["source"], (manifest,))


def _open_mixture(folder: Path, manifest: dict[str, Any], tokenizer: HybridTokenizer, verify: bool | None) -> Corpus:
    corpora: list[Corpus] = []
    parts: list[MixturePart] = []
    for entry in manifest["mix"]:
        corpus = open_corpus(folder / entry["folder"], tokenizer, verify)
        corpora.append(corpus)
        parts.append(MixturePart(corpus.train, entry["weight"], entry["name"]))
    table = byte_table(tokenizer)
    train = TokenStream([shard for corpus in corpora for shard in corpus.train.shards], table)
    validation = TokenStream([shard for corpus in corpora for shard in corpus.validation.shards], table)
    fingerprint = _hash([[corpus.fingerprint, part.weight] for corpus, part in zip(corpora, parts, strict=True)])
    manifests = tuple(corpus.manifests[0] for corpus in corpora)
    return Corpus(train, validation, tuple(parts), fingerprint, manifest["source"], manifests)


def _open_shards(folder: Path, split: str, manifest: dict[str, Any], verify: bool | None) -> list[Shard]:
    try:
        entries = manifest[split]["shards"]
        if verify is None:
            verify = sum(manifest[each]["tokens"] for each in SPLITS) * 2 <= _VERIFIED
    except (KeyError, TypeError) as error:
        raise _damaged(folder, f"manifest.json: {error}") from None
    shards = []
    for number, entry in enumerate(entries):
        arrays = []
        for name, kind in zip(shard_files(split, number), ("tokens", "documents"), strict=True):
            try:
                dtype = DOCUMENT_DTYPE if kind == "documents" else np.dtype(manifest["dtype"])
                arrays.append(_open_array(folder / name, kind, dtype, entry, verify))
            except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
                raise _damaged(folder, f"{name}: {error}") from None
        shards.append(Shard(arrays[0], arrays[1], bool(entry["prompts"])))
    return shards


def _open_array(path: Path, kind: str, dtype: np.dtype, entry: dict[str, Any], verify: bool) -> np.ndarray:
    """Memory-map one file of a shard and compare it with its entry in the manifest.

    Raises:
        OSError, ValueError, KeyError, TypeError, EOFError: The file is damaged.
    """
    array = np.load(path, mmap_mode="r")
    if (array.size, array.dtype) != (entry[kind], dtype):
        raise ValueError(f"{array.size} {kind}, not {entry[kind]}")
    if verify and checksum(array) != entry[f"{kind}_sha256"]:
        raise ValueError("its checksum is not that of the manifest")
    return array


def _damaged(folder: Path, problem: str) -> UserError:
    return UserError(f"the corpus in {folder} is damaged ({problem}): remove that folder to build it again")


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
