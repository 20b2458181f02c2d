"""The file format of saved tokenizers: written atomically, verified when read, never executed.

Layout, all numbers little-endian:

======  ==========================================================
8       magic bytes ``HYBTOK\\r\\n``
2       version: 1; 2 for portable tokenizers; 3 for both kinds if they have turn tokens
32      SHA-256 of everything after the next field
4       length of the uncompressed content
rest    the content, compressed with zlib
======  ==========================================================

The content is a JSON header, prefixed by its length (4 bytes), and the id pairs and counts as uint32. The hash covers
the compressed bytes, because some bits of those do not affect the content, and a change of them is damage too. Sizes
are checked before memory is allocated, and parents must come before children.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
import sys
import zlib
from array import array
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizer.errors import TokenizerError
from tokenizer.vocabulary import (
    FIRST_BYTE,
    FIRST_LEARNED,
    MAX_ENTRIES,
    MAX_ENTRY,
    PORTABLE_PATTERN,
    SP,
    Vocabulary,
)

MAGIC = b"HYBTOK\r\n"
VERSION = 1
PORTABLE_VERSION = 2
"""Version of the files of portable tokenizers: programs that do not know them refuse it."""
TURNS_VERSION = 3
"""Version of the files of tokenizers with turn tokens, portable or not: programs that do not know these refuse it."""
_HEAD = struct.Struct("<8sH32sI")
MAX_CONTENT = 64 << 20
"""Maximum size of the uncompressed content in bytes; a million entries take less than half of it."""


def content_of(vocabulary: Vocabulary) -> bytes:
    """Return the uncompressed content; equal vocabularies give equal bytes."""
    header = {
        "lowercase": vocabulary.lowercase,
        "byte_limit": vocabulary.byte_limit,
        "alphabet": "".join(vocabulary.alphabet),
        "bases": list(vocabulary.bases),
        "pairs": "".join(chain.from_iterable(sorted(vocabulary.pairs.items()))),
        "merges": len(vocabulary.merges),
        "phrases": len(vocabulary.phrases),
        "counts": len(vocabulary.counts),
        "note": vocabulary.note,
    }
    if vocabulary.portable:
        header["pattern"] = vocabulary.pattern
    if vocabulary.turns:
        header["turns"] = True
    text = json.dumps(header, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode()
    pairs = (*vocabulary.merges, *vocabulary.phrases)
    # Left and right ids compress better separately than interleaved.
    numbers = array("I", [left for left, _ in pairs] + [right for _, right in pairs] + list(vocabulary.counts))
    if sys.byteorder == "big":
        numbers.byteswap()
    return struct.pack("<I", len(text)) + text + numbers.tobytes()


def fingerprint(vocabulary: Vocabulary) -> str:
    """Return the SHA-256 of the content, in hexadecimal."""
    return hashlib.sha256(content_of(vocabulary)).hexdigest()


def write(vocabulary: Vocabulary, path: str | os.PathLike[str]) -> None:
    """Write a vocabulary to a file, atomically.

    Raises:
        TokenizerError: The file cannot be written.
    """
    content = content_of(vocabulary)
    packed = zlib.compress(content, 9)
    version = _version_of(vocabulary)
    head = _HEAD.pack(MAGIC, version, hashlib.sha256(packed).digest(), len(content))
    write_bytes(head + packed, path)


def _version_of(vocabulary: Vocabulary) -> int:
    if vocabulary.turns:
        return TURNS_VERSION
    return PORTABLE_VERSION if vocabulary.portable else VERSION


def write_bytes(data: bytes, path: str | os.PathLike[str]) -> None:
    """Write data to a file, atomically.

    Raises:
        TokenizerError: The file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TokenizerError(f"cannot write {target}: {error.strerror or error}") from None


def read(path: str | os.PathLike[str]) -> Vocabulary:
    """Read and verify a file.

    Raises:
        TokenizerError: The file cannot be read, is damaged, is not a tokenizer, or has a newer format.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_CONTENT + 1)
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror or error}") from None
    return parse(data, str(path))


def parse(data: bytes, name: str) -> Vocabulary:
    """Parse the bytes of a file; `name` is used in error messages.

    Raises:
        TokenizerError: The data is damaged, is not a tokenizer, or has a newer format.
    """
    if data[:2] == b"\x1f\x8b":
        raise TokenizerError(
            f"{name}: not a tokenizer file, but a gzip file; HybridTokenizer.import_pickle reads the pickles of my_slm"
        )
    if len(data) < _HEAD.size or data[:8] != MAGIC:
        raise TokenizerError(f"{name}: not a tokenizer file; expected a file written by HybridTokenizer.save")
    _, version, digest, length = _HEAD.unpack_from(data)
    if not VERSION <= version <= TURNS_VERSION:
        raise TokenizerError(
            f"{name}: format version {version}, but this program reads {VERSION} to {TURNS_VERSION}: use a "
            "newer slm_jax"
        )
    if length > MAX_CONTENT:
        raise TokenizerError(f"{name}: damaged (claims {length} bytes of content; the maximum is {MAX_CONTENT})")
    packed = data[_HEAD.size :]
    if hashlib.sha256(packed).digest() != digest:
        raise TokenizerError(f"{name}: damaged or truncated (its SHA-256 does not match its content)")
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(packed, length + 1)
    except zlib.error:
        raise TokenizerError(f"{name}: damaged or truncated (it cannot be decompressed)") from None
    if len(content) != length or not unpacker.eof or unpacker.unused_data:
        raise TokenizerError(f"{name}: damaged or truncated (its length is wrong)")
    try:
        vocabulary = _parse_content(content)
        if version != _version_of(vocabulary):
            raise TokenizerError("damaged (the version is that of another kind of tokenizer)")
        return vocabulary
    except TokenizerError as error:
        raise TokenizerError(f"{name}: {error}") from None
    except (ValueError, KeyError, TypeError, struct.error, UnicodeError, RecursionError):
        raise TokenizerError(f"{name}: damaged (its content is malformed)") from None


def _parse_content(content: bytes) -> Vocabulary:
    (size,) = struct.unpack_from("<I", content)
    text = content[4 : 4 + size]
    # Parsing takes up to a hundred times the size of a list's text: its length is bounded first. Entries with commas
    # and the few fields of the header are far below the second half.
    if text.count(b",") > 2 * MAX_ENTRIES:
        raise TokenizerError(f"damaged (more than {MAX_ENTRIES} entries)")
    header = json.loads(text)
    merges = _field(header, "merges", int)
    phrases = _field(header, "phrases", int)
    counts = _field(header, "counts", int)
    alphabet = _field(header, "alphabet", str)
    bases = _field(header, "bases", list)
    entries = len(alphabet) + len(bases) + merges + phrases
    if min(merges, phrases, counts) < 0 or max(entries, counts) > MAX_ENTRIES:
        raise TokenizerError(f"damaged (more than {MAX_ENTRIES} entries)")
    total = merges + phrases
    if len(content) - 4 - size != 4 * (2 * total + counts):
        raise TokenizerError("damaged (the number of entries does not match the length)")
    numbers = array("I", content[4 + size :])
    if sys.byteorder == "big":
        numbers.byteswap()
    pairs = tuple(zip(numbers[:total], numbers[total : 2 * total], strict=True))
    letters = _field(header, "pairs", str)
    if len(letters) % 2 or not all(type(base) is str and len(base) <= MAX_ENTRY for base in bases):
        raise TokenizerError("damaged (case pairs or bases)")
    if len(letters) > sys.maxunicode or len({*letters}) != len(letters):
        raise TokenizerError("damaged (a letter has two cases)")
    vocabulary = Vocabulary(
        lowercase=_field(header, "lowercase", bool),
        byte_limit=_field(header, "byte_limit", int),
        alphabet=tuple(alphabet),
        bases=tuple(bases),
        merges=pairs[:merges],
        phrases=pairs[merges:],
        pairs=dict(zip(letters[::2], letters[1::2], strict=True)),
        counts=tuple(numbers[2 * total :]),
        note=_field(header, "note", str),
        pattern=_field(header, "pattern", str) if "pattern" in header else "",
        turns=_field(header, "turns", bool) if "turns" in header else False,
    )
    check_consistency(vocabulary)
    return vocabulary


def _field(header: dict[str, Any], key: str, kind: type) -> Any:
    value = header[key]
    if type(value) is not kind:
        raise TokenizerError(f"damaged (field {key} must be of type {kind.__name__})")
    return value


def check_consistency(vocabulary: Vocabulary) -> None:
    """Check that parents come before children and that texts are unique and valid.

    Raises:
        TokenizerError: The parts of the vocabulary do not fit together.
        UnicodeEncodeError: An entry contains a lone surrogate.
    """
    if vocabulary.portable:
        _check_portable(vocabulary)
        return
    first = vocabulary.first_merge
    turns = vocabulary.turn_ids if vocabulary.turns else ()
    for offset, (left, right) in enumerate((*vocabulary.merges, *vocabulary.phrases)):
        end = first + offset
        is_special = left in turns or right in (vocabulary.up, vocabulary.caps, *turns)
        if not (SP <= left < end and SP <= right < end) or is_special:
            raise TokenizerError(f"damaged (token {end} is made of {left} and {right})")
    texts = vocabulary.texts
    learned = texts[vocabulary.first_entry :]
    if "" in learned or len(set(learned)) != len(learned):
        raise TokenizerError("damaged (empty or repeated entries)")
    if any(len(letter) != 1 for letter in vocabulary.alphabet):
        raise TokenizerError("damaged (alphabet)")
    "".join(learned).encode("utf-8")  # raises UnicodeEncodeError for lone surrogates
    if vocabulary.counts and len(vocabulary.counts) != len(learned):
        raise TokenizerError("damaged (counts)")


def _check_portable(vocabulary: Vocabulary) -> None:
    """Check that merges join bytes and earlier merges, and that entries are unique and not named like others.

    Raises:
        TokenizerError: The parts of the vocabulary do not fit together, or its pattern is unknown.
        UnicodeEncodeError: A base contains a lone surrogate.
    """
    if vocabulary.pattern != PORTABLE_PATTERN:
        raise TokenizerError(
            f"the pattern {vocabulary.pattern!r} is not known here, only {PORTABLE_PATTERN!r}: use a newer slm_jax"
        )
    if vocabulary.lowercase or vocabulary.alphabet or vocabulary.phrases or vocabulary.pairs:
        raise TokenizerError("damaged (a portable tokenizer has bases and merges only)")
    first = vocabulary.first_merge
    no_parts = range(FIRST_LEARNED, first)  # turn tokens and bases
    for end, pair in enumerate(vocabulary.merges, start=first):
        if not all(FIRST_BYTE <= part < end and part not in no_parts for part in pair):
            raise TokenizerError(f"damaged (token {end} is made of {pair[0]} and {pair[1]})")
    "".join(vocabulary.bases).encode("utf-8")  # raises UnicodeEncodeError for lone surrogates
    learned = vocabulary.data[vocabulary.first_entry :]
    entries = [*vocabulary.data[FIRST_BYTE:FIRST_LEARNED], *learned]
    if b"" in learned or len(set(entries)) != len(entries) or len(set(vocabulary.names)) != vocabulary.size:
        raise TokenizerError("damaged (empty or repeated entries)")
    if vocabulary.counts and len(vocabulary.counts) != len(learned):
        raise TokenizerError("damaged (counts)")
