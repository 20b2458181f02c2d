"""Tokenized text on disk: shards of token ids that are memory-mapped, never read as a whole.

A corpus folder holds `manifest.json`, the tokenizer, and numbered shards of the splits `train` and `validation`:
`train-00000.tokens.npy` are the ids (uint16, or uint32 for more than 65,536) of its documents one after another, each
followed by <EOS> (unless it was cut for the split and its end is in the other one). In a corpus with conversations the
top bit of an id marks tokens outside the turns of the assistant (see `marks`). `train-00000.documents.npy` has an
entry of DOCUMENT_DTYPE for each document. The folder appears under its name only when it is complete (see `build`). The
folder of a mixture holds several corpora and a manifest that lists them with their weights.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.data.corpus.stream import DOCUMENT_DTYPE, Shard, TokenStream, byte_table, heads
from slm_jax.data.corpus.verification import ShardVerifier, checksum
from slm_jax.utils.errors import UserError
from slm_jax.utils.labels import source_labels
from slm_jax.utils.text_tokenizer import TextTokenizer

FORMAT = 3
CHAT_FORMAT = 4  # of corpora with conversations: their ids have marks (see `marks`), which earlier versions cannot read
# Format 2 has the same files, but long documents were cut into parts for the split. Corpora in runs are still read;
# those in the cache are made again.
READABLE = (2, FORMAT, CHAT_FORMAT)
SPLITS = ("train", "validation")
# Bytes; corpora up to this size are verified whenever they are opened, in a tenth of a second; larger ones block by
# block, as they are read.
_VERIFIED = 64 << 20


@dataclass(frozen=True)
class MixturePart:
    """One corpus of a mixture.

    Attributes:
        train: Its training split.
        weight: Its share of the training batches, not normalized.
        name: The label of its source.
    """

    train: TokenStream
    weight: float
    name: str


class HeldOut(NamedTuple):
    """Held-out text of one source.

    Attributes:
        name: The label of the source.
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


def shard_files(split: str, number: int) -> tuple[str, str]:
    """Return the names of a shard's two files, tokens and documents."""
    return f"{split}-{number:05d}.tokens.npy", f"{split}-{number:05d}.documents.npy"


def read_manifest(folder: Path, mixture: Path | None = None) -> dict[str, Any]:
    """Read the manifest of a corpus folder.

    Args:
        folder: The folder.
        mixture: The folder of the mixture that the corpus is a part of, for the error messages.

    Raises:
        UserError: It is damaged, or of another version of the format.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        number = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"manifest.json: {error}", mixture) from None
    if number not in READABLE:
        raise UserError(
            f"the corpus in {folder} has format {number}, this version reads {', '.join(map(str, READABLE))}: "
            f"remove {mixture or folder} to build it again"
        )
    return manifest


def open_corpus(
    folder: Path, tokenizer: TextTokenizer, verify: bool | None = None, mixture: Path | None = None
) -> Corpus:
    """Open the corpus in a folder, memory-mapped.

    Args:
        folder: The folder of a corpus or a mixture.
        tokenizer: The tokenizer it was built with.
        verify: Whether to compare every checksum; None: now if the corpus is small, else those of each block when it is
            first read (see `verification`). Sizes are always compared.
        mixture: The folder of the mixture that the corpus is a part of, for the error messages.

    Raises:
        UserError: The corpus is damaged (names the shard), or was built with another tokenizer.
    """
    manifest = read_manifest(folder, mixture)
    if "mix" in manifest:
        return _open_mixture(folder, manifest, tokenizer, verify)
    if manifest["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"the corpus in {folder} was built with another tokenizer: remove {mixture or folder} to build it again"
        )
    table = byte_table(tokenizer)
    opening = _Opening(folder, manifest, tokenizer.vocab_size, verify, mixture)
    train, validation = (TokenStream(opening.shards(split), table) for split in SPLITS)
    checksums = [
        [shard["tokens_sha256"], shard["documents_sha256"]] for split in SPLITS for shard in manifest[split]["shards"]
    ]
    fingerprint = _hash([manifest["format"], manifest["tokenizer"], checksums])
    part = MixturePart(train, 1.0, source_labels([manifest["name"]])[0])
    return Corpus(train, validation, (part,), fingerprint, manifest["source"], (manifest,))


def _open_mixture(folder: Path, manifest: dict[str, Any], tokenizer: TextTokenizer, verify: bool | None) -> Corpus:
    corpora: list[Corpus] = []
    parts: list[MixturePart] = []
    labels = source_labels([entry["name"] for entry in manifest["mix"]])
    for entry, label in zip(manifest["mix"], labels, strict=True):
        corpus = open_corpus(folder / entry["folder"], tokenizer, verify, folder)
        corpora.append(corpus)
        parts.append(MixturePart(corpus.train, entry["weight"], label))
    table = byte_table(tokenizer)
    train = TokenStream([shard for corpus in corpora for shard in corpus.train.shards], table)
    validation = TokenStream([shard for corpus in corpora for shard in corpus.validation.shards], table)
    fingerprint = mixture_fingerprint(
        [(corpus.fingerprint, part.weight) for corpus, part in zip(corpora, parts, strict=True)]
    )
    manifests = tuple(corpus.manifests[0] for corpus in corpora)
    return Corpus(train, validation, tuple(parts), fingerprint, manifest["source"], manifests)


def mixture_fingerprint(parts: Sequence[tuple[str, float]]) -> str:
    """Return the fingerprint of a mixture.

    Args:
        parts: Fingerprint and weight of each corpus, in order.
    """
    return _hash([list(part) for part in parts])


class _Opening:
    """The opening of a corpus folder."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], vocab_size: int, verify: bool | None, mixture: Path | None
    ):
        self._folder = folder
        self._manifest = manifest
        self._vocab_size = vocab_size
        self._verify = verify
        self._mixture = mixture

    def shards(self, split: str) -> list[Shard]:
        """Memory-map the shards of a split, and verify them now or let them be verified as they are read.

        Raises:
            UserError: A shard or the manifest is damaged.
        """
        try:
            entries = self._manifest[split]["shards"]
            size = sum(self._manifest[each]["tokens"] for each in SPLITS) * 2
            numbered = list(enumerate(entries))
        except (KeyError, TypeError) as error:
            raise self._error(f"manifest.json: {error}") from None
        return [self._shard(shard_files(split, number), entry, size <= _VERIFIED) for number, entry in numbered]

    def _shard(self, names: tuple[str, str], entry: dict[str, Any], is_small: bool) -> Shard:
        try:
            tokens = open_array(self._folder / names[0], np.dtype(self._manifest["dtype"]), entry["tokens"])
            documents = open_array(self._folder / names[1], DOCUMENT_DTYPE, entry["documents"])
            marked = self._manifest["format"] == CHAT_FORMAT
            verifier = ShardVerifier(names, tokens, documents, entry, self._vocab_size, self._error, marked)
            prompts = bool(entry["prompts"])
            if self._verify or (self._verify is None and is_small):
                verifier.verify_all()
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._error(str(error)) from None
        return Shard(tokens, documents, prompts, verifier if self._verify is None and not is_small else None, marked)

    def _error(self, problem: str) -> UserError:
        if self._manifest["format"] < FORMAT:
            return UserError(
                f"the corpus in {self._folder} is damaged ({problem}) and of an earlier version, which split text in "
                "another way: restore it from a backup, or start another --run"
            )
        return _damaged(self._folder, problem, self._mixture)


def open_array(path: Path, dtype: np.dtype, size: int) -> np.memmap:
    """Memory-map a .npy file with one axis.

    NumPy evaluates the header of a damaged file in several ways, with exceptions of several kinds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not an array of this type and size; the text names the file.
    """
    array: np.memmap
    try:
        array = np.load(path, mmap_mode="r")
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path.name}: its header is damaged ({type(error).__name__})") from None
    if (getattr(array, "shape", None), array.dtype) != ((size,), dtype):
        raise ValueError(f"{path.name}: an array of {array.size:,} {array.dtype}, not {size:,} {dtype}")
    if array.offset + array.nbytes != path.stat().st_size:
        raise ValueError(f"{path.name}: its header is damaged (the data do not begin at byte {array.offset})")
    return array


def read_documents(folder: Path, split: str, number: int, entry: dict[str, Any]) -> np.ndarray:
    """Read the documents of a shard without its tokens.

    Args:
        folder: The folder of the corpus.
        split: The split.
        number: The number of the shard.
        entry: Its entry in the manifest.

    Returns:
        DOCUMENT_DTYPE [D], memory-mapped.

    Raises:
        OSError, ValueError, KeyError, TypeError: The file or the entry is damaged.
    """
    name = shard_files(split, number)[1]
    documents = open_array(folder / name, DOCUMENT_DTYPE, entry["documents"])
    if checksum(documents) != entry["documents_sha256"]:
        raise ValueError(f"{name}: its checksum is not that of the manifest")
    return documents


def _damaged(folder: Path, problem: object, mixture: Path | None = None) -> UserError:
    return UserError(f"the corpus in {folder} is damaged ({problem}): remove {mixture or folder} to build it again")


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
