"""Encode long texts, and many texts, with NumPy: find all words, look all of them up, make the ids of the new ones.

A *word* is what a kind of tokenizer encodes independently of everything else: a pre-token, or a part of a long one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tokenizer.encoding.unicode import text_to_bytes
from tokenizer.encoding.word_cache import PADDING, WordCache, WordIds

_BLOCK = 600_000
"""Characters that are encoded at once: with fewer, calls of NumPy take longer than their work."""
_TEXTS_AT_ONCE = 1 << 14
_SEPARATOR = "\0"


class Block(NamedTuple):
    """Several texts, joined, with a character after each of them.

    Attributes:
        text: The joined texts.
        codes: Its characters, uint8 or uint32 [T].
        ends: Where the characters between the texts are, int64.
    """

    text: str
    codes: np.ndarray
    ends: np.ndarray


class Words(NamedTuple):
    """The words of a block.

    Attributes:
        text: The joined texts.
        data: Their bytes, followed by `PADDING` zeros, uint8.
        starts: First character of each word, int64 [n].
        stops: The character after each word, int64 [n].
        byte_starts: First byte of each word, int64 [n].
        lengths: Bytes of each word, int64 [n].
    """

    text: str
    data: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    byte_starts: np.ndarray
    lengths: np.ndarray


class BulkEncoder:
    """Encodes texts with one vocabulary. Safe to use from several threads.

    Args:
        cache: The ids of words, with entries of the vocabulary that are always kept.
        blocks_to_encode: Cut a text into blocks of about a number of characters, where words end.
        find_starts: Return whether a word starts at each character of a block, bool [T]; it does at the characters
            between texts and after each of them.
        segment: Make the ids of the words with these indices.
    """

    def __init__(
        self,
        cache: WordCache,
        blocks_to_encode: Callable[[str, int], Iterator[str]],
        find_starts: Callable[[Block], np.ndarray],
        segment: Callable[[Words, np.ndarray], Iterable[WordIds]],
    ) -> None:
        self.cache = cache
        self._blocks_to_encode = blocks_to_encode
        self._find_starts = find_starts
        self._segment = segment

    def ids(self, text: str) -> bytes:
        """Return the ids of a text, as the bytes of an int32 array."""
        return b"".join([self._encode([block])[0] for block in self._blocks_to_encode(text, _BLOCK)])

    def ids_of_many(self, texts: Sequence[str]) -> list[bytes]:
        """Return `ids` of each text."""
        rows: list[bytes] = []
        group: list[str] = []
        size = 0
        for text in texts:
            if group and (size + len(text) > _BLOCK or len(group) == _TEXTS_AT_ONCE):
                rows += self._encode(group)
                group = []
                size = 0
            if len(text) > _BLOCK:
                rows.append(self.ids(text))
                continue
            group.append(text)
            size += len(text) + 1
        return rows + self._encode(group) if group else rows

    def _encode(self, texts: list[str]) -> list[bytes]:
        words, words_before = self._split(texts)
        if not len(words.starts):
            return [b""] * len(texts)
        ids, counts = self.cache.look_up(
            words.data, words.byte_starts, words.lengths, lambda indices: self._segment(words, indices)
        )
        data = ids.tobytes()
        if len(texts) == 1:
            return [data]
        ids_before = np.concatenate(([0], np.cumsum(counts)))[words_before]
        places = (4 * ids_before).tolist()
        return [data[start:stop] for start, stop in zip(places, [*places[1:], len(data)], strict=True)]

    def _split(self, texts: list[str]) -> tuple[Words, np.ndarray]:
        """Return the words of texts, and the number of words before each text."""
        text = _SEPARATOR.join([*texts, ""])
        encoded = text_to_bytes(text)
        data = np.frombuffer(encoded + bytes(PADDING), dtype=np.uint8)
        is_ascii = len(encoded) == len(text)
        codes = data[: len(text)]
        if not is_ascii:
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        lengths = np.array(list(map(len, texts)), dtype=np.int64)
        ends = np.cumsum(lengths + 1) - 1
        starts = np.flatnonzero(self._find_starts(Block(text, codes, ends)))
        separators = np.searchsorted(starts, ends)
        stops = np.append(starts[1:], len(text))
        byte_starts = starts
        byte_stops = stops
        if not is_ascii:
            first_bytes = np.append(np.flatnonzero(data[: len(encoded)] & 0xC0 != 0x80), len(encoded))
            byte_starts = first_bytes.take(starts)
            byte_stops = first_bytes.take(stops)
        kept = np.ones(len(starts), dtype=bool)
        kept[separators] = False
        columns = (starts, stops, byte_starts, byte_stops - byte_starts)
        words = Words(text, data, *(column[kept] for column in columns))
        words_before = separators - np.arange(len(texts))
        return words, np.concatenate(([0], words_before[:-1]))
