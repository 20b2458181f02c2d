"""The files of a part of a corpus, see `parts`.

CORPUS.parts-3/2/             part 2 of 3 of a corpus in the cache
  part.json                   what it was made from, the checksums of its chunks, and whether it is complete
  00000.records.npy           an entry of RECORD_DTYPE for each document and invalid row, in order
  00000.tokens.npy            the token ids of these documents
  00000.json                  groups, the reasons of invalid rows, and texts that the merge may need
"""

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.data.corpus.corpus import open_array
from slm_jax.data.corpus.verification import checksum
from slm_jax.data.corpus.writing import write_json

PART_FORMAT = 1

RECORD_DTYPE = np.dtype(
    [
        ("digest", "<u8"),  # see `Document.digest`
        ("split_digest", "<u8"),
        ("size", "<u4"),  # characters
        ("tokens", "<u4"),  # stored ids
        ("bytes", "<u4"),  # these three as in DOCUMENT_DTYPE
        ("prompt", "<u4"),
        ("rest", "<i4"),
        ("kind", "u1"),
        ("split", "u1"),  # index in OWN_SPLITS
        ("grouped", "u1"),
        ("response", "u1"),  # 1 if it is an instruction or a conversation, which are never cut
    ]
)
DOCUMENT = 0  # encoded as a whole
EMPTY = 1
INVALID = 2
REPEATED = 3  # a duplicate of an earlier document of the part, not encoded
CUT = 4  # three records of PIECE follow: the text that is held out, the gap, and the rest
PIECE = 5
OWN_SPLITS = (None, "train", "validation")


class Part(NamedTuple):
    """Number of a part, from 1, and the number of all parts."""

    number: int
    total: int

    def folder(self, corpus: Path) -> Path:
        """Return the folder of the part.

        Args:
            corpus: The folder of the complete corpus.
        """
        return parts_folder(corpus, self.total) / str(self.number)


def parts_folder(corpus: Path, count: int) -> Path:
    """Return the folder of the parts of a corpus."""
    return corpus.with_name(f"{corpus.name}.parts-{count}")


@dataclass
class PartState:
    """The state of a part on disk; saved after each chunk.

    Attributes:
        header: What it is made from.
        version: The version of the source.
        groups: Number of its groups in the chunks.
        chunks: Size and checksums of each chunk.
        done: Whether all groups are written.
        limited: Whether the source goes on, beyond a limit of documents or tokens.
    """

    header: dict[str, Any]
    version: str = ""
    groups: int = 0
    chunks: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False
    limited: bool = False

    def save(self, folder: Path) -> None:
        """Write part.json."""
        write_json(folder / "part.json", vars(self))

    @classmethod
    def load(cls, folder: Path) -> "PartState | None":
        """Read part.json; return None if there is none, or it is damaged."""
        try:
            return cls(**json.loads((folder / "part.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def total(self, quantity: str) -> int:
        """Return the number of tokens or records."""
        return sum(chunk[quantity] for chunk in self.chunks)


class StoredGroup(NamedTuple):
    """A group of a part.

    Attributes:
        unit: The number of its file, or of the group in the source.
        position: The position of the source's reader after it.
        records: RECORD_DTYPE [n].
        tokens: The ids of all its documents.
        invalid: Reason and location of its invalid rows.
        texts: Texts that its ids do not restore, by the index of their record.
    """

    unit: int
    position: Any
    records: np.ndarray
    tokens: np.ndarray
    invalid: list[list[str]]
    texts: dict[int, str]


def read_groups(folder: Path, state: PartState, dtype: np.dtype) -> Iterator[StoredGroup]:
    """Yield the groups of a part; each chunk is verified first.

    Raises:
        OSError, ValueError, KeyError, TypeError: A chunk is damaged.
    """
    for number, entry in enumerate(state.chunks):
        records_file, tokens_file, groups_file = chunk_files(folder, number)
        records = open_array(records_file, RECORD_DTYPE, entry["records"])
        tokens = open_array(tokens_file, dtype, entry["tokens"])
        content = json.loads(groups_file.read_text(encoding="utf-8"))
        sums = [checksum(records), checksum(tokens), json_checksum(content)]
        if sums != entry["sha256"]:
            raise ValueError(f"chunk {number + 1}: its checksum is not that of part.json")
        invalid = iter(content["invalid"])
        texts = deque(content.get("texts", ()))
        first = token = 0
        for unit, count, position in content["groups"]:
            group = records[first : first + count]
            ids = int(group["tokens"].sum(dtype=np.int64))
            rows = int(np.count_nonzero(group["kind"] == INVALID))
            own_texts = {}
            while texts and texts[0][0] < first + count:
                index, text = texts.popleft()
                own_texts[index - first] = text
            own_invalid = list(itertools.islice(invalid, rows))
            yield StoredGroup(unit, position, group, tokens[token : token + ids], own_invalid, own_texts)
            first += count
            token += ids


def chunk_files(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """Return the files of a chunk: records, tokens, and groups."""
    names = (f"{number:05d}.records.npy", f"{number:05d}.tokens.npy", f"{number:05d}.json")
    return folder / names[0], folder / names[1], folder / names[2]


def json_checksum(content: Any) -> str:
    """Return the SHA-256 of a JSON value, hashed part by part: it may hold whole documents."""
    digest = hashlib.sha256()
    for part in json.JSONEncoder(sort_keys=True).iterencode(content):
        digest.update(part.encode())
    return digest.hexdigest()
