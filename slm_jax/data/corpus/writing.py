"""Write the files of a corpus: arrays and JSON, each as a whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from slm_jax.data.corpus.corpus import shard_files
from slm_jax.data.corpus.stream import TURNS
from slm_jax.data.corpus.verification import block_checksums, checksum
from slm_jax.utils.files import replace_file


def write_shard(
    folder: Path, split: str, number: int, tokens: np.ndarray, documents: np.ndarray, marked: bool = False
) -> dict[str, Any]:
    """Write the files of a shard.

    Args:
        folder: The folder of the corpus.
        split: The split.
        number: The number of the shard.
        tokens: Token ids, uint16 or uint32 [N].
        documents: DOCUMENT_DTYPE [D].
        marked: Whether the corpus has conversations, whose ids have marks.

    Returns:
        The entry of the shard in the manifest.
    """
    tokens_file, documents_file = shard_files(split, number)
    write_array(folder / tokens_file, tokens)
    write_array(folder / documents_file, documents)
    turns = {"turns": int(documents[TURNS].sum(dtype=np.int64))} if marked else {}
    return {
        "tokens": tokens.size,
        "documents": documents.size,
        "bytes": int(documents["bytes"].sum(dtype=np.int64)),
        "prompts": int(np.count_nonzero(documents["prompt"])),
        **turns,
        "tokens_sha256": checksum(tokens),
        "tokens_crc32": block_checksums(tokens),
        "documents_sha256": checksum(documents),
    }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as a whole or not at all; it is on the disk when this returns."""

    def write(file: IO[bytes]) -> None:
        for part in json.JSONEncoder(indent=1).iterencode(value):  # the value may hold whole documents
            file.write(part.encode())
        file.write(b"\n")

    _write_file(path, write)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file as a whole or not at all; it is on the disk when this returns."""
    _write_file(path, lambda file: save_array(file, array))


def save_array(file: IO[bytes], array: np.ndarray) -> None:
    """Write an array as `numpy.save` does, but keep the cause of a failure.

    Into a real file NumPy writes with `tofile`, whose OSError has no errno, so that a full disk is not recognized.

    Raises:
        OSError: Writing failed.
    """
    np.save(_WriteOnly(file), array)


class _WriteOnly:
    """A file that NumPy does not recognize as one on the disk."""

    def __init__(self, file: IO[bytes]):
        self.write = file.write


def _write_file(path: Path, write: Callable[[Any], Any]) -> None:
    with replace_file(path) as partial, partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # a rename may otherwise reach the disk before the content
