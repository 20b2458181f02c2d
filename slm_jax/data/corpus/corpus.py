"""Tokenised text on disk: shards of token ids that are memory-mapped, never read whole.

A corpus folder holds `manifest.json`, the tokenizer, and for `train` and `validation` numbered shards:
`train-00000.tokens.npy`, the ids (uint16, or uint32 for more than 65,536) of its documents one behind another, each
followed by <EOS>; and `train-00000.documents.npy`, a row of `DOCUMENT` for each. It appears under its name only when
it is whole (`build`). A folder of several corpora to be mixed has a manifest that names them with their weights.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.utils.errors import UserError
from tokenizer import HybridTokenizer
from tokenizer.vocabulary import FIRST_BYTE

FORMAT = 2
SPLITS = ("train", "validation")
DOCUMENT = np.dtype(
    [
        ("end", "<i8"),  # index in the shard behind its <EOS>
        ("digest", "<u8"),  # the first 8 bytes of the SHA-256 of its text
        ("bytes", "<u4"),  # UTF-8 bytes of the text that is predicted
        ("prompt", "<u4"),  # its first tokens, which are not to be predicted
        ("rest", "<i4"),  # bytes beyond those that `byte_table` gives to its tokens; nearly always 0
        ("unused", "<u4"),  # keeps `end` aligned, so that it is searched without being copied
    ]
)
_VERIFIED = (
    64 << 20
)  # bytes; corpora up to this size are checked in full whenever they are opened, in a tenth of a second


class Shard(NamedTuple):
    """Token ids uint16 or uint32 [N], documents `DOCUMENT` [D], and whether one of them has a prompt."""

    tokens: np.ndarray
    documents: np.ndarray
    prompts: bool = False


class TokenStream:
    """One split of a corpus: a stream of N tokens in D documents, over shards. `split[a:b]` reads token ids."""

    def __init__(self, shards: Sequence[Shard], byte_table: np.ndarray | None = None):
        """byte_table: see `byte_table`; needed by `num_bytes_between`."""
        self.shards = list(shards)
        self._byte_table = byte_table
        self._starts = np.cumsum([0, *(shard.tokens.size for shard in self.shards)])
        self._first = np.cumsum([0, *(shard.documents.size for shard in self.shards)])
        self.has_prompts = any(shard.prompts for shard in self.shards)  # some tokens are not to be predicted

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, _ = index.indices(len(self))
        found = [self.shards[i].tokens[a:b] for i, a, b in self._places(start, stop)]
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, np.uint16), *found])

    @property
    def num_documents(self) -> int:
        """D."""
        return int(self._first[-1])

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all text that is predicted."""
        return sum(int(shard.documents["bytes"].sum()) for shard in self.shards)

    @property
    def ends(self) -> np.ndarray:
        """int64 [D]: the index behind the <EOS> of each document."""
        pairs = zip(self.shards, self._starts, strict=False)
        return np.concatenate([np.zeros(0, np.int64), *(shard.documents["end"] + start for shard, start in pairs)])

    @property
    def documents(self) -> np.ndarray:
        """`DOCUMENT` [D], the ends within their shards."""
        return np.concatenate([np.zeros(0, DOCUMENT), *(shard.documents for shard in self.shards)])

    def head(self, max_tokens: int) -> "TokenStream":
        """The first documents, as many as fit in max_tokens (at least one); 0: all."""
        if not max_tokens or len(self) <= max_tokens:
            return self
        kept: list[Shard] = []
        for shard, start in zip(self.shards, self._starts, strict=False):
            n = int(np.searchsorted(shard.documents["end"] + start, max_tokens, side="right"))
            n = max(n, 0 if kept else 1)
            if n:
                documents = shard.documents[:n]
                kept.append(Shard(shard.tokens[: documents["end"][-1]], documents, shard.prompts))
            if n < shard.documents.size:
                break
        return TokenStream(kept, self._byte_table)

    def prompt_mask(self, start: int, stop: int) -> np.ndarray | None:
        """bool [stop - start]: tokens that are not to be predicted; None where there are none."""
        if not self.has_prompts:
            return None
        mask = np.zeros(stop - start, bool)
        for index, start_here, stop_here in self._places(start, stop):
            base = self._starts[index] - start  # of the shard in the mask
            for first, prompt, end in self._overlapping(index, start_here, stop_here):
                mask[max(first + base, 0) : max(min(first + prompt, end) + base, 0)] = True
        return mask

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """int64 [n]: those of the tokens start..stop-1 with which a document begins."""
        found = [np.zeros(0, np.int64)]
        for index, a, b in self._places(start, stop):
            ends = self.shards[index].documents["end"]
            first, last = np.searchsorted(ends, (a, b))
            found += [self._starts[index : index + (a == 0)], ends[first:last] + self._starts[index]]
        return np.concatenate(found).astype(np.int64)

    def num_bytes_between(self, start: int, stop: int) -> int:
        """UTF-8 bytes of text that the tokens start..stop-1 stand for: summed over all of a document exactly its
        length, prompts left out."""
        assert self._byte_table is not None
        tokens, prompt = self[start:stop], self.prompt_mask(start, stop)
        sizes = self._byte_table[tokens if prompt is None else tokens[~prompt]]
        total = int(sizes.sum())
        for index, a, b in self._places(start, stop):
            documents = self.shards[index].documents
            first, last = np.searchsorted(documents["end"], (a, b), side="right")
            total += int(documents["rest"][first:last].sum())  # it belongs to the <EOS>
        return total

    def _overlapping(self, index: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(first token, prompt tokens, end) of a shard's documents that reach into start..stop-1."""
        documents = self.shards[index].documents
        first = int(np.searchsorted(documents["end"], start, side="right"))
        last = int(np.searchsorted(documents["end"], stop, side="left")) + 1
        begin = int(documents["end"][first - 1]) if first else 0
        for end, prompt in zip(
            documents["end"][first:last].tolist(), documents["prompt"][first:last].tolist(), strict=True
        ):
            yield begin, prompt, end
            begin = end

    def _places(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, start, stop within it) of the stretches that make up start..stop-1."""
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            base, end = int(self._starts[index]), min(stop, int(self._starts[index + 1]))
            yield index, start - base, end - base
            start, index = end, index + 1


@dataclass(frozen=True)
class MixturePart:
    """One corpus of a mixture, with its share of the training rows (not normalised)."""

    train: TokenStream
    weight: float
    name: str


@dataclass(frozen=True)
class Corpus:
    """Both sides, what they are mixed of, and the fingerprint of their content."""

    train: TokenStream
    validation: TokenStream
    parts: tuple[MixturePart, ...]
    fingerprint: str
    source: Any
    manifests: tuple[dict[str, Any], ...]  # of each part


def byte_table(tokenizer: HybridTokenizer) -> np.ndarray:
    """int32 [V]: UTF-8 bytes of the text of each id by itself (0 for special tokens and case marks)."""
    sizes = [len(tokenizer.decode([i]).encode("utf-8", "surrogatepass")) for i in range(tokenizer.vocab_size)]
    sizes[FIRST_BYTE : FIRST_BYTE + 256] = [1] * 256
    return np.array(sizes, np.int32)


def checksum(array: np.ndarray) -> str:
    """SHA-256 of an array's content."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def shard_files(split: str, number: int) -> tuple[str, str]:
    """The names of a shard's two files."""
    return f"{split}-{number:05d}.tokens.npy", f"{split}-{number:05d}.documents.npy"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a corpus folder. Raises UserError if it is damaged or of another version."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        number = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"manifest.json: {error}") from None
    if number != FORMAT:
        raise UserError(
            f"the corpus in {folder} is of format {number}, this version reads {FORMAT}: "
            "remove that folder to make it again"
        )
    return manifest


def open_corpus(folder: Path, tokenizer: HybridTokenizer, verify: bool | None = None) -> Corpus:
    """The corpus in a folder, memory-mapped. Raises UserError if it is damaged (with the shard's name) or was made with
    another tokenizer.

    verify: compare every checksum (None: where that takes no time); sizes are compared always.
    """
    manifest = read_manifest(folder)
    if "mix" in manifest:
        corpora = [open_corpus(folder / each["folder"], tokenizer, verify) for each in manifest["mix"]]
        table = byte_table(tokenizer)
        parts = [
            MixturePart(c.train, each["weight"], each["name"]) for c, each in zip(corpora, manifest["mix"], strict=True)
        ]
        both = {split: TokenStream([s for c in corpora for s in getattr(c, split).shards], table) for split in SPLITS}
        content = [[c.fingerprint, part.weight] for c, part in zip(corpora, parts, strict=True)]
        manifests = tuple(c.manifests[0] for c in corpora)
        return Corpus(both["train"], both["validation"], tuple(parts), _hash(content), manifest["source"], manifests)
    if manifest["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"the corpus in {folder} was made with another tokenizer: remove that folder to make it again")
    table = byte_table(tokenizer)
    splits = {split: TokenStream(_open_shards(folder, split, manifest, verify), table) for split in SPLITS}
    sums = [
        [shard["tokens_sha256"], shard["documents_sha256"]] for split in SPLITS for shard in manifest[split]["shards"]
    ]
    part = MixturePart(splits["train"], 1.0, manifest["name"])
    fingerprint = _hash([FORMAT, manifest["tokenizer"], sums])
    return Corpus(splits["train"], splits["validation"], (part,), fingerprint, manifest["source"], (manifest,))


def _open_shards(folder: Path, split: str, manifest: dict[str, Any], verify: bool | None) -> list[Shard]:
    shards = []
    try:
        listed = manifest[split]["shards"]
        if verify is None:
            verify = sum(manifest[each]["tokens"] for each in SPLITS) * 2 <= _VERIFIED
    except (KeyError, TypeError) as error:
        raise _damaged(folder, f"manifest.json: {error}") from None
    for number, noted in enumerate(listed):
        arrays = []
        for name, kind in zip(shard_files(split, number), ("tokens", "documents"), strict=True):
            try:
                array = np.load(folder / name, mmap_mode="r")
                wanted = (noted[kind], DOCUMENT if kind == "documents" else np.dtype(manifest["dtype"]))
                if (array.size, array.dtype) != wanted:
                    raise ValueError(f"{array.size} {kind}, not {noted[kind]}")
                if verify and checksum(array) != noted[f"{kind}_sha256"]:
                    raise ValueError("its checksum is not that of the manifest")
            except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
                raise _damaged(folder, f"{name}: {error}") from None
            arrays.append(array)
        shards.append(Shard(arrays[0], arrays[1], bool(noted["prompts"])))
    return shards


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"the corpus in {folder} is damaged ({what}): remove that folder to make it again")


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
