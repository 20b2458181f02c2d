"""Text to ids, fast: the reference of `tokenizer.segment` with a memory of the keys met so far.

Text is cut into keys by `str.split` where its white space is plain and by a regular expression elsewhere, each
key is looked up, and only keys that were never met are segmented, all of a block in one batch. Every number here is
a matter of speed: the ids are those of `encode_reference` (tests/tokenizer/test_roundtrip.py).
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING

from tokenizer.encoding.segment import segment_key
from tokenizer.units import MAX_KEY, cut_long_key
from tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizer.encoding.batch import BatchSegmenter

FIRST_BLOCK, LAST_BLOCK = 1 << 14, 1 << 20
"""Characters after which unknown keys are segmented: few at first, when nearly all are unknown, then more and more."""
PIECE = 1 << 12
"""Characters that are looked up at once: what was cut is still in the processor's cache."""
MEMORY_LIMIT = 48 << 20
"""Bytes, estimated from above, that the memory of keys may take; then it starts anew."""
BATCH_FROM = 64
"""From so many unknown keys on, the NumPy segmentation is faster than the plain one."""

_WORD = re.compile(r"[^ \n]+")
_KEY_BOUNDARY = re.compile(r"(?<=[^ \n])[ \n]")
# A key after its single leading space, which is left away; other white space stays in front.
_KEYS = re.compile(r"(?: (?=[^ \n]))?([ \n]*[^ \n]+|[ \n]+)")
RUN_SIGNS = frozenset(("", "\n", "\n\n"))


def blocks(text: str, size: int, last: int = 0) -> Iterator[str]:
    """The text in stretches of about `size` characters, doubling up to `last`, cut where a key begins."""
    start, length = 0, len(text)
    while length - start > size:
        boundary = _KEY_BOUNDARY.search(text, start + size)
        if boundary is None:
            break
        yield text[start : boundary.start()]
        start = boundary.start()
        if size < last:
            size *= 2
    yield text[start:] if start else text


def split_first_word(text: str) -> tuple[str, str]:
    """(the word at the very beginning, the rest): the rest begins with white space or is empty."""
    match = _WORD.match(text)
    return (text[: match.end()], text[match.end() :]) if match else ("", text)


def split_plain(text: str) -> list[str]:
    """The keys, in short form, of a text that begins with white space.

    The short form of a key leaves a single leading space away: "word" stands for " word". The keys are right only
    where no spaces stand side by side or beside a newline and no more than two newlines meet; otherwise one of
    `RUN_SIGNS` is among them.
    """
    text = text.replace("\n", " \n")
    if "\n \n" in text:
        text = text.replace("\n \n", "\n\n")
    keys = text.split(" ")
    del keys[0]
    return keys


def split_any(text: str) -> list[str]:
    """The keys, in short form, of any text that begins with white space."""
    return _KEYS.findall(text)


def long_form(key: str) -> str:
    """The text of a key in short form."""
    return key if key[:1] in WHITE else " " + key


WHITE = frozenset((" ", "\n"))


class Encoder:
    """Encodes with one vocabulary; may be used from several threads at once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        # By keys in short form; white space alone is never among them, which is how a run of it is noticed.
        self._memory: dict[str, bytes] = {}
        # By plain text: words at the beginning of a text, and the parts of long keys.
        self._memory_of_parts: dict[str, bytes] = {}
        self._memory_bytes = 0
        self._lock = Lock()

    def ids(self, text: str) -> bytes:
        """The int32 ids of a text, as bytes, before phrases are joined."""
        word, rest = split_first_word(text)
        found = self._parts(cut_long_key(word)) if word else []
        if rest:
            for block in blocks(rest, FIRST_BLOCK, LAST_BLOCK):
                found += self._block(block)
        return b"".join(found)

    def ids_of_many(self, texts: Sequence[str]) -> list[bytes]:
        """For each text what `ids` gives, in much less time where the texts are short."""
        split = [split_first_word(text) for text in texts]
        words = [cut_long_key(word) if word else [] for word, _ in split]
        parts = iter(self._parts([part for cut in words for part in cut]))
        found = [[next(parts) for _ in cut] for cut in words]
        for first in range(0, len(texts), 4096):
            rows = self._look_up([rest for _, rest in split[first : first + 4096]])
            for row, rest in zip(found[first:], rows, strict=False):
                row += rest
        return [b"".join(row) for row in found]

    def _block(self, block: str) -> list[bytes]:
        """The ids of a text that begins with white space, in parts."""
        return [b"".join(found) for found in self._look_up(blocks(block, PIECE))]

    def _look_up(self, pieces: Iterable[str]) -> list[list[bytes]]:
        """For each of the texts, which begin with white space or are empty, the ids of its keys."""
        look_up = self._memory.get
        rows: list[list[bytes | None]] = []
        unknown: list[tuple[list[str], list[int], list[bytes | None]]] = []
        runs = False
        for piece in pieces:
            keys = split_any(piece) if runs else split_plain(piece)
            found = list(map(look_up, keys))
            places = _places_of_none(found)
            if places and not runs and not RUN_SIGNS.isdisjoint([keys[place] for place in places]):
                keys = split_any(piece)
                found = list(map(look_up, keys))
                places = _places_of_none(found)
                runs = True
            elif runs:
                runs = "  " in piece or "\n " in piece
            if places:
                unknown.append((keys, places, found))
            rows.append(found)
        if unknown:
            new = self._unknown({keys[place] for keys, places, _ in unknown for place in places})
            for keys, places, found in unknown:
                for place in places:
                    found[place] = new[keys[place]]
        return rows  # type: ignore[return-value]  # no None is left

    def _unknown(self, keys: set[str]) -> dict[str, bytes]:
        """The ids of keys in short form; remembers them unless they are long."""
        short = [key for key in keys if len(key) < MAX_KEY]
        parts = [key if key[:1] in WHITE else " " + key for key in short]
        long = [(key, cut_long_key(long_form(key))) for key in keys if len(key) >= MAX_KEY]
        for _, cut in long:
            parts += cut
        ids = self._parts(parts, len(short))
        new = dict(zip(short, ids, strict=False))
        self._remember(self._memory, {key: value for key, value in new.items() if key.strip(" \n")})
        at = len(short)
        for key, cut in long:
            new[key] = b"".join(ids[at : at + len(cut)])
            at += len(cut)
        return new

    def _parts(self, texts: list[str], fresh: int = 0) -> list[bytes]:
        """The ids of texts of at most `MAX_KEY` characters. The first `fresh` are neither looked up nor remembered."""
        wanted = texts[:fresh]
        memory = self._memory_of_parts
        later = [memory.get(text) for text in texts[fresh:]]
        others = list(dict.fromkeys(text for text, ids in zip(texts[fresh:], later, strict=True) if ids is None))
        ids = self._segment(wanted + others)
        if others:
            new = dict(zip(others, ids[fresh:], strict=True))
            self._remember(memory, new)
            later = [new[text] if known is None else known for text, known in zip(texts[fresh:], later, strict=True)]
        return ids[:fresh] + later  # type: ignore[operator]

    def _segment(self, keys: list[str]) -> list[bytes]:
        if len(keys) >= BATCH_FROM:
            return self._batch.segment(keys)
        # All edges take longer to make than a few keys to segment without.
        look_up = self.vocabulary.edges.get if "_batch" in self.__dict__ else self.vocabulary.edge
        return [array("i", segment_key(key, self.vocabulary, look_up)).tobytes() for key in keys]

    @cached_property
    def _batch(self) -> BatchSegmenter:
        from tokenizer.encoding.batch import BatchSegmenter  # imports NumPy, which short texts do without

        # What is an entry, or a case mark and an entry, is its own segmentation: nothing needs to be computed.
        known = {
            text[1:]: array("i", ids).tobytes()
            for text, ids in self.vocabulary.edges.items()
            if text[0] == " " and len(text) > 1 and text[1] not in WHITE and ids[0] != self.vocabulary.caps
        }
        self._remember(self._memory, known)
        return BatchSegmenter(self.vocabulary)

    def _remember(self, memory: dict[str, bytes], new: dict[str, bytes]) -> None:
        size = sum(map(sys.getsizeof, new)) + sum(map(len, new.values())) + 160 * len(new)
        with self._lock:
            if self._memory_bytes + size > MEMORY_LIMIT:
                self._memory.clear()
                self._memory_of_parts.clear()
                self._memory_bytes = 0
            if size <= MEMORY_LIMIT:
                memory.update(new)
                self._memory_bytes += size


def _places_of_none(values: list[bytes | None]) -> list[int]:
    places: list[int] = []
    if None not in values:
        return places
    at = -1
    try:
        while True:
            at = values.index(None, at + 1)
            places.append(at)
    except ValueError:
        return places
