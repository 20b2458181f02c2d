"""Verification of shards: as a whole when a corpus is opened, or block by block as they are first read."""

import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from slm_jax.data.corpus.marks import without_marks
from slm_jax.utils.errors import UserError

BLOCK = 1 << 17  # tokens; a window of a batch lies in one or two blocks, which are verified in a fifth of a millisecond


def checksum(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's content."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def block_checksums(tokens: np.ndarray) -> list[int]:
    """Return the CRC-32 of each block of `BLOCK` tokens; detects accidental damage, not forgery."""
    return [
        zlib.crc32(np.ascontiguousarray(tokens[start : start + BLOCK]).data) for start in range(0, tokens.size, BLOCK)
    ]


class ShardVerifier:
    """Compares a shard with the checksums of its manifest.

    Shards of versions that stored no checksums of blocks are one block. Several threads may verify at the same time;
    a block may then be verified twice.
    """

    def __init__(
        self,
        names: tuple[str, str],
        tokens: np.ndarray,
        documents: np.ndarray,
        entry: dict[str, Any],
        vocab_size: int,
        error: Callable[[str], UserError],
        marked: bool = False,
    ):
        """Verify nothing yet.

        Args:
            names: The files of tokens and documents, for the error message.
            tokens: Token ids [N].
            documents: DOCUMENT_DTYPE [D].
            entry: The manifest's entry of the shard.
            vocab_size: Number of ids of the tokenizer.
            error: Returns the error for a problem.
            marked: Whether the ids have marks.

        Raises:
            ValueError, KeyError, TypeError: The entry is damaged.
        """
        self._names = names
        self._tokens = tokens
        self._documents = documents
        self._entry = entry
        self._vocab_size = vocab_size
        self._error = error
        self._marked = marked
        self._crcs: list[int] | None = entry.get("tokens_crc32")
        self._block = BLOCK if self._crcs is not None else max(tokens.size, 1)
        count = -(-tokens.size // self._block)
        if self._crcs is not None and len(self._crcs) != count:
            raise ValueError(f"{len(self._crcs)} checksums of {count} blocks")
        self._verified = bytearray(count)
        self._documents_verified = False

    def verify_all(self) -> None:
        """Verify the whole shard by its SHA-256.

        Raises:
            UserError: It is damaged.
        """
        self.verify_documents()
        if checksum(self._tokens) != self._entry["tokens_sha256"]:
            raise self._error(f"{self._names[0]}: its checksum is not that of the manifest")
        self._check_ids(self._tokens, "")

    def verify_documents(self) -> None:
        """Verify the documents unless that was done.

        Raises:
            UserError: They are damaged.
        """
        if self._documents_verified:
            return
        if checksum(self._documents) != self._entry["documents_sha256"]:
            raise self._error(f"{self._names[1]}: its checksum is not that of the manifest")
        self._documents_verified = True

    def verify(self, start: int, stop: int) -> None:
        """Verify the documents and those blocks of the tokens start..stop-1 that were not verified.

        Raises:
            UserError: They are damaged.
        """
        self.verify_documents()
        for block in range(start // self._block, -(-stop // self._block)):
            if not self._verified[block]:
                self._verify_block(block)

    def _verify_block(self, block: int) -> None:
        first = block * self._block
        tokens = self._tokens[first : first + self._block]
        place = f" in block {block + 1} of {len(self._verified)} (tokens {first:,} to {first + tokens.size - 1:,})"
        if self._crcs is None:
            is_intact = checksum(tokens) == self._entry["tokens_sha256"]
        else:
            is_intact = zlib.crc32(np.ascontiguousarray(tokens).data) == self._crcs[block]
        if not is_intact:
            raise self._error(f"{self._names[0]}: the checksum differs{place}")
        self._check_ids(tokens, place)
        self._verified[block] = 1

    def _check_ids(self, tokens: np.ndarray, place: str) -> None:
        if self._marked:
            tokens = without_marks(tokens)
        largest = int(tokens.max()) if tokens.size else 0
        if largest >= self._vocab_size:
            raise self._error(
                f"{self._names[0]}: id {largest:,}{place} is beyond the {self._vocab_size:,} ids of the tokenizer"
            )
