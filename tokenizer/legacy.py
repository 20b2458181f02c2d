"""Reading the `tokenizer_state.pkl.gz` of the original project, without running anything that is in it.

Its ids cannot be kept, because its encoding was not reversible; its word counts can, and a new vocabulary is frozen
from them.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizer.errors import TokenizerError

MAX_BYTES = 512 << 20
"""Bytes that a file may unpack to."""


class _CountsOnly(pickle.Unpickler):
    """Builds plain containers, strings, numbers and Counter; anything else is an error."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "Counter"):
            return Counter
        raise pickle.UnpicklingError(f"it wants to create {module}.{name}")


def read_word_counts(path: str | os.PathLike[str]) -> tuple[dict[str, int], bool, int]:
    """({word: count}, lowercase, byte_limit) out of an old file. Raises TokenizerError when it is anything else."""
    try:
        with Path(path).open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            data = (gzip.GzipFile(fileobj=raw) if packed else raw).read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from None
    if len(data) > MAX_BYTES:
        raise TokenizerError(f"{path}: unpacks to more than {MAX_BYTES} bytes")
    try:
        state: Any = _CountsOnly(io.BytesIO(data)).load()
    except Exception as error:  # whatever a malformed pickle can raise: nothing of it has run
        raise TokenizerError(f"{path}: not a tokenizer state of the original project ({error})") from None
    words = state.get("word_db") if isinstance(state, dict) else None
    if not isinstance(words, dict) or not words:
        raise TokenizerError(f"{path}: holds no word counts")
    for word, count in words.items():
        if type(word) is not str or type(count) is not int or not 0 < count < 1 << 50:
            raise TokenizerError(f"{path}: its word counts are damaged")
    lowercase, byte_limit = state.get("lowercase", True), state.get("byte_limit", 4)
    if type(lowercase) is not bool or type(byte_limit) is not int:
        raise TokenizerError(f"{path}: its options are damaged")
    return dict(words), lowercase, min(max(byte_limit, 1), 16)
