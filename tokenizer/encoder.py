"""Text to ids, fast: the reference of `tokenizer.segment` with a memory of the keys met so far.

A block of text is cut into keys by `str.split` where its white space is plain and by a regular expression elsewhere, each key is
looked up, and only keys that were never met are segmented, all of a block in one batch. Every number here is a matter
of speed: the ids are those of `encode_reference` (tests/tokenizer/test_encoder.py).
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterator
from threading import Lock

from tokenizer.segment import segment_key
from tokenizer.units import MAX_KEY, cut_long_key
from tokenizer.vocabulary import Vocabulary

BLOCK = 1 << 18
"""Characters that are looked up at once."""
MEMORY_LIMIT = 48 << 20
"""Bytes, estimated from above, that the memory of keys may take; then it starts anew."""
BATCH_FROM = 96
"""From so many unknown keys on, the NumPy segmentation is faster than the plain one."""

_KEY_BOUNDARY = re.compile(r"(?<=[^ \n])[ \n]")
# A key after its single leading space, which is left away; other white space stays in front.
_KEYS = re.compile(r"(?: (?=[^ \n]))?([ \n]*[^ \n]+|[ \n]+)")


def blocks(text: str, size: int = BLOCK) -> Iterator[str]:
    """The text in pieces of about `size` characters, cut where a key begins."""
    start = 0
    while len(text) - start > size:
        boundary = _KEY_BOUNDARY.search(text, start + size)
        if boundary is None:
            break
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:] if start else text


def short_keys(block: str) -> tuple[str | None, list[str]]:
    """(the word at the very beginning, if any; all further keys of the block) in short form.

    The short form of a key leaves a single leading space away: "word" stands for " word" and "" for " ".
    """
    if "  " in block or " \n" in block or "\n " in block:
        keys = _KEYS.findall(block)
        bare = block[0] not in " \n"
    else:
        spaced = block.replace("\n", " \n")
        if "\n\n" in block:  # runs of newlines back together: twice, because matches do not overlap
            spaced = spaced.replace("\n \n", "\n\n").replace("\n \n", "\n\n")
        keys = spaced.split(" ")
        bare = keys[0] != ""
        if not bare:
            del keys[0]
    if bare:
        first = keys[0]
        del keys[0]
        return first, keys
    return None, keys


def long_form(key: str) -> str:
    """The text of a key in short form."""
    return key if key[:1] in (" ", "\n") and key else " " + key


class Encoder:
    """Encodes with one vocabulary; may be used from several threads at once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._memory: dict[str, bytes] = {}
        self._memory_of_words: dict[str, bytes] = {}  # of texts without a space before them
        self._memory_bytes = 0
        self._lock = Lock()

    def parts(self, text: str) -> Iterator[list[bytes]]:
        """For each block of the text the int32 ids of its keys, as bytes, before phrases are joined."""
        if not text:
            return
        for block in blocks(text):
            first, keys = short_keys(block)
            found: list[bytes | None] = list(map(self._memory.get, keys))
            if None in found:
                self._fill(keys, found)
            if first is not None:
                yield [self._word(first)]
            yield found  # type: ignore[misc]  # _fill left no None

    def _word(self, text: str) -> bytes:
        """The ids of a text without white space, as bytes."""
        known = self._memory_of_words.get(text)
        if known is None:
            known = b"".join(self._segment(cut_long_key(text)))
            if len(text) <= MAX_KEY:
                self._remember(self._memory_of_words, {text: known})
        return known

    def _fill(self, keys: list[str], found: list[bytes | None]) -> None:
        """Replace each None in `found` by the ids of the key at its place."""
        places = []
        at = -1
        try:
            while True:
                at = found.index(None, at + 1)
                places.append(at)
        except ValueError:
            unknown = dict.fromkeys(keys[place] for place in places)
        short = {key: long_form(key) for key in unknown if len(key) < MAX_KEY}
        new = dict(zip(short, self._segment(list(short.values())), strict=True))
        for place in places:
            key = keys[place]
            found[place] = new[key] if key in new else self._long(long_form(key))
        self._remember(self._memory, new)

    def _long(self, key: str) -> bytes:
        """The ids of a key of `MAX_KEY` or more characters, which is not remembered as a whole."""
        parts = cut_long_key(key)
        memory = self._memory_of_words
        found = list(map(memory.get, parts))
        if None in found:
            unknown = list(dict.fromkeys(part for part, ids in zip(parts, found, strict=True) if ids is None))
            new = dict(zip(unknown, self._segment(unknown), strict=True))
            found = [ids if ids is not None else new[part] for part, ids in zip(parts, found, strict=True)]
            self._remember(memory, new)
        return b"".join(found)  # type: ignore[arg-type]

    def _segment(self, keys: list[str]) -> list[bytes]:
        return [array("i", segment_key(key, self.vocabulary)).tobytes() for key in keys]

    def _remember(self, memory: dict[str, bytes], new: dict[str, bytes]) -> None:
        size = sum(map(sys.getsizeof, new)) + sum(map(len, new.values())) + 160 * len(new)
        with self._lock:
            if self._memory_bytes + size > MEMORY_LIMIT:
                self._memory.clear()
                self._memory_of_words.clear()
                self._memory_bytes = 0
            if size <= MEMORY_LIMIT:
                memory.update(new)
                self._memory_bytes += size
