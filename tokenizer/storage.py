"""The saved file: written, verified and read without running anything that is in it.

Layout: 8 bytes magic, 2 bytes version, 32 bytes SHA-256 of what follows behind the length, 4 bytes length of the
content (all little-endian), then the content compressed by zlib. (The hash is of the compressed bytes: some bits of
those mean nothing, and a change of them is damage too.) The content is a length-prefixed JSON header and the id pairs
as uint32. Sizes are checked before anything is allocated; parents must come before children.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import zlib
from array import array
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizer.errors import TokenizerError
from tokenizer.vocabulary import MAX_ENTRIES, Vocabulary

MAGIC = b"HYBTOK\r\n"
VERSION = 1
_HEAD = struct.Struct("<8sH32sI")
MAX_CONTENT = 64 << 20
"""Bytes of content that a file may unpack to; a million entries take less than half of it."""


def content_of(vocabulary: Vocabulary) -> bytes:
    """The uncompressed content: equal vocabularies give equal bytes."""
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
    text = json.dumps(header, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode()
    pairs = (*vocabulary.merges, *vocabulary.phrases)
    # Left and right ids apart compress better than interleaved.
    numbers = array("I", [left for left, _ in pairs] + [right for _, right in pairs] + list(vocabulary.counts))
    if sys.byteorder == "big":
        numbers.byteswap()
    return struct.pack("<I", len(text)) + text + numbers.tobytes()


def fingerprint(vocabulary: Vocabulary) -> str:
    """SHA-256 of the content, in hexadecimal."""
    return hashlib.sha256(content_of(vocabulary)).hexdigest()


def write(vocabulary: Vocabulary, path: str | os.PathLike[str]) -> None:
    """Write the file; it appears whole or not at all."""
    content = content_of(vocabulary)
    packed = zlib.compress(content, 9)
    head = _HEAD.pack(MAGIC, VERSION, hashlib.sha256(packed).digest(), len(content))
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(head + packed)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TokenizerError(f"cannot write {target}: {error.strerror or error}") from None


def read(path: str | os.PathLike[str]) -> Vocabulary:
    """Read and verify a file; TokenizerError says what is wrong with it."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_CONTENT + 1)
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror or error}") from None
    return parse(data, str(path))


def parse(data: bytes, name: str) -> Vocabulary:
    """The vocabulary in the bytes of a file called `name`."""
    if len(data) < _HEAD.size or data[:8] != MAGIC:
        what = "is an old pickle: HybridTokenizer.import_pickle reads those" if data[:2] == b"\x1f\x8b" else "is none"
        raise TokenizerError(
            f"{name}: not a tokenizer file (a file written by HybridTokenizer.save is needed; this {what})"
        )
    _, version, digest, length = _HEAD.unpack_from(data)
    if version != VERSION:
        raise TokenizerError(f"{name}: format version {version}, this program reads {VERSION}: use a newer slm_jax")
    if length > MAX_CONTENT:
        raise TokenizerError(f"{name}: damaged (claims {length} bytes of content; the most is {MAX_CONTENT})")
    if hashlib.sha256(data[_HEAD.size :]).digest() != digest:
        raise TokenizerError(f"{name}: damaged or cut off (its SHA-256 does not fit its content)")
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(data[_HEAD.size :], length + 1)
    except zlib.error:
        raise TokenizerError(f"{name}: damaged or cut off (it cannot be unpacked)") from None
    if len(content) != length or not unpacker.eof or unpacker.unused_data:
        raise TokenizerError(f"{name}: damaged or cut off (its length is wrong)")
    try:
        return _vocabulary(content)
    except TokenizerError as error:
        raise TokenizerError(f"{name}: {error}") from None
    except (ValueError, KeyError, TypeError, struct.error, UnicodeError):
        raise TokenizerError(f"{name}: damaged (its content makes no sense)") from None


def _field(header: dict[str, Any], key: str, kind: type) -> Any:
    value = header[key]
    if type(value) is not kind:
        raise TokenizerError(f"damaged (field {key} is no {kind.__name__})")
    return value


def _vocabulary(content: bytes) -> Vocabulary:
    (size,) = struct.unpack_from("<I", content)
    header = json.loads(content[4 : 4 + size])
    counted = [_field(header, key, int) for key in ("merges", "phrases", "counts")]
    if min(counted) < 0 or max(counted) > MAX_ENTRIES:
        raise TokenizerError(f"damaged (more than {MAX_ENTRIES} entries)")
    total = counted[0] + counted[1]
    if len(content) - 4 - size != 4 * (2 * total + counted[2]):
        raise TokenizerError("damaged (the number of entries does not fit the length)")
    numbers = array("I", content[4 + size :])
    if sys.byteorder == "big":
        numbers.byteswap()
    pairs = tuple(zip(numbers[:total], numbers[total : 2 * total], strict=True))
    letters = _field(header, "pairs", str)
    bases = _field(header, "bases", list)
    if len(letters) % 2 or not all(type(base) is str for base in bases):
        raise TokenizerError("damaged (case pairs or bases)")
    if len({*letters}) != len(letters):
        raise TokenizerError("damaged (a letter has two cases)")
    vocabulary = Vocabulary(
        lowercase=_field(header, "lowercase", bool),
        byte_limit=_field(header, "byte_limit", int),
        alphabet=tuple(_field(header, "alphabet", str)),
        bases=tuple(bases),
        merges=pairs[: counted[0]],
        phrases=pairs[counted[0] :],
        pairs=dict(zip(letters[::2], letters[1::2], strict=True)),
        counts=tuple(numbers[2 * total :]),
        note=_field(header, "note", str),
    )
    check(vocabulary)
    return vocabulary


def check(vocabulary: Vocabulary) -> None:
    """Raise TokenizerError unless the parts fit together: parents before children, texts unique and proper."""
    first, marks = vocabulary.first_merge, (vocabulary.up, vocabulary.caps)
    for offset, (left, right) in enumerate((*vocabulary.merges, *vocabulary.phrases)):
        if not (7 <= left < first + offset and 7 <= right < first + offset) or right in marks:
            raise TokenizerError(f"damaged (token {first + offset} is made of {left} and {right})")
    texts = vocabulary.texts
    learned = texts[vocabulary.first_entry :]
    if "" in learned or len(set(learned)) != len(learned):
        raise TokenizerError("damaged (empty or repeated entries)")
    if any(len(letter) != 1 for letter in vocabulary.alphabet):
        raise TokenizerError("damaged (alphabet)")
    "".join(learned).encode("utf-8")  # UnicodeEncodeError on lone surrogates, which no entry contains
    if vocabulary.counts and len(vocabulary.counts) != len(learned):
        raise TokenizerError("damaged (counts)")
