"""Read the `tokenizer_state.pkl.gz` of the original project (my_slm) without executing anything in it.

Its ids cannot be kept, because its encoding was not reversible. Its word counts can: a new vocabulary is learned from
them.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tokenizer.errors import TokenizerError

_MAX_BYTES = 512 << 20
"""Maximum size of a decompressed file."""


class LegacyState(NamedTuple):
    """The parts of an old tokenizer that can be kept.

    Attributes:
        word_counts: {word: count}.
        lowercase: Its option of that name.
        byte_limit: Its option of that name, limited to 1 to 16.
    """

    word_counts: dict[str, int]
    lowercase: bool
    byte_limit: int


class _RestrictedUnpickler(pickle.Unpickler):
    """Builds plain containers, strings, numbers and Counter; refuses everything else."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "Counter"):
            return Counter
        raise pickle.UnpicklingError(f"it tries to create {module}.{name}")


def read_legacy_state(path: str | os.PathLike[str]) -> LegacyState:
    """Read the word counts and options of an old file.

    Raises:
        TokenizerError: The file cannot be read or contains anything else.
    """
    try:
        with Path(path).open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            data = (gzip.GzipFile(fileobj=raw) if compressed else raw).read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from None
    if len(data) > _MAX_BYTES:
        raise TokenizerError(f"{path}: decompresses to more than {_MAX_BYTES} bytes")
    try:
        state: Any = _RestrictedUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a malformed pickle can raise almost anything; no code from it has run
        raise TokenizerError(f"{path}: not a tokenizer state of my_slm ({error})") from None
    words = state.get("word_db") if isinstance(state, dict) else None
    if not isinstance(words, dict) or not words:
        raise TokenizerError(f"{path}: contains no word counts")
    for word, count in words.items():
        if type(word) is not str or type(count) is not int or not 0 < count < 1 << 50:
            raise TokenizerError(f"{path}: its word counts are damaged")
    lowercase = state.get("lowercase", True)
    byte_limit = state.get("byte_limit", 4)
    if type(lowercase) is not bool or type(byte_limit) is not int:
        raise TokenizerError(f"{path}: its options are damaged")
    return LegacyState(dict(words), lowercase, min(max(byte_limit, 1), 16))
