"""Tokenised text on disk: made once per run, memory-mapped after that.

A corpus folder holds, for `train` and `validation`, the token ids (each document followed by <EOS>), where each
document ends, how many bytes of UTF-8 it was, and a manifest. It appears under its name only when it is whole.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.errors import UserError
from tokenizer import HybridTokenizer

_LONG = 10_000  # characters; longer documents are split in parts of this size, so that a few novels can be validated on
_FEW = 20  # parts; fewer are cut into about so many
_FORMAT = 1


@dataclass(frozen=True)
class Split:
    """One side of a corpus: token ids [N], ends int64 [documents] (index after each <EOS>), bytes int64 [documents]."""

    tokens: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return int(self.sizes.sum())

    def head(self, max_tokens: int) -> "Split":
        """The first documents, as many as fit in max_tokens (at least one); 0: all."""
        if not max_tokens or self.ends[-1] <= max_tokens:
            return self
        n = max(1, int(np.searchsorted(self.ends, max_tokens, side="right")))
        return Split(self.tokens[: self.ends[n - 1]], self.ends[:n], self.sizes[:n])


@dataclass(frozen=True)
class Corpus:
    """Both sides, and the fingerprint of what they were made from."""

    train: Split
    validation: Split
    fingerprint: str
    source: object


def split_documents(documents: Iterable[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """(train, validation) texts. Exact repeats are dropped; each text's own hash decides its side, so that adding
    documents moves none.

    Long documents are cut into parts first, and a text of few parts into about 20 (adding to so small a text moves
    them). Where no hash falls below the fraction, the lowest one is held out. Raises UserError if there is not enough
    text for two sides.
    """
    whole = list(documents)
    texts = [part for text in whole for part in _parts(text, _LONG)]
    if len(texts) < _FEW:  # else what is held out could be one of three files
        size = max(1, sum(map(len, whole)) // _FEW)
        texts = [part for text in whole for part in _parts(text, size)]
    seen: set[bytes] = set()
    sides: tuple[list[str], list[str]] = ([], [])
    lowest: tuple[bytes, int] | None = None
    for text in texts:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        if digest in seen:
            continue
        seen.add(digest)
        held_out = int.from_bytes(digest[:8], "big") < validation_fraction * 2**64
        sides[held_out].append(text)
        if not held_out and (lowest is None or digest < lowest[0]):
            lowest = (digest, len(sides[0]) - 1)
    train, validation = sides
    if not validation and lowest is not None:  # few documents: none fell below the fraction
        validation.append(train.pop(lowest[1]))
    if not train:
        raise UserError("the text is too short to be split into training and validation: add more")
    return train, validation


def _parts(text: str, size: int) -> Iterable[str]:
    """The text in parts of about `size` characters, cut after a line (else after a space, else anywhere)."""
    start = 0
    while len(text) - start > 1.5 * size:
        limit = start + size
        cut = max(text.rfind("\n", start, limit), -1) + 1 or max(text.rfind(" ", start, limit), -1) + 1 or limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def write_corpus(
    folder: Path,
    sides: tuple[list[str], list[str]],
    tokenizer: HybridTokenizer,
    at_least: int = 1,
    source: object = None,
) -> None:
    """Tokenise both sides into `folder`, which appears at once when it is whole; `source` is noted in the manifest.

    Raises UserError, and leaves no folder, if there are fewer than at_least tokens (one batch) to train on.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    partial.mkdir(parents=True)
    eos = tokenizer.token2id["<EOS>"]
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    manifest: dict[str, Any] = {"format": _FORMAT, "tokenizer": tokenizer.fingerprint, "source": source}
    for name, texts in zip(("train", "validation"), sides, strict=True):
        ids, ends, sizes, checksum = [], [], [], hashlib.sha256()
        for text in texts:
            ids.append(np.append(tokenizer.encode_array(text), eos).astype(dtype))
            ends.append(ids[-1].size)
            sizes.append(len(text.encode("utf-8", "surrogatepass")))
        tokens = np.concatenate(ids)
        checksum.update(tokens.tobytes())
        np.save(partial / f"{name}.tokens.npy", tokens)
        np.save(partial / f"{name}.ends.npy", np.cumsum(ends))
        np.save(partial / f"{name}.sizes.npy", np.array(sizes))
        manifest[name] = {
            "documents": len(texts),
            "tokens": int(tokens.size),
            "bytes": int(sum(sizes)),
            "sha256": checksum.hexdigest(),
        }
    found = manifest["train"]["tokens"]
    if found < at_least:
        shutil.rmtree(partial)
        raise UserError(
            f"the training text has {found:,} tokens, but one batch takes {at_least:,}: "
            "add text, or lower --train.batch_size or --train.sequence_length"
        )
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    partial.rename(folder)


def open_corpus(folder: Path, tokenizer: HybridTokenizer) -> Corpus:
    """The corpus in a folder, memory-mapped. Raises UserError if it is damaged or was made with another tokenizer."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        splits = {}
        for name in ("train", "validation"):
            arrays = [np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("tokens", "ends", "sizes")]
            splits[name] = Split(*arrays)
            if (
                splits[name].tokens.size != manifest[name]["tokens"]
                or splits[name].ends[-1] != splits[name].tokens.size
            ):
                raise ValueError(f"{name} has {splits[name].tokens.size} tokens, not {manifest[name]['tokens']}")
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError) as error:
        raise UserError(f"the corpus in {folder} is damaged ({error}): remove that folder to make it again") from None
    if manifest["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"the corpus in {folder} was made with another tokenizer: remove that folder to make it again")
    fingerprint = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return Corpus(splits["train"], splits["validation"], fingerprint, manifest.get("source"))
