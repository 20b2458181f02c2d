"""Text to ids with a portable vocabulary, fast: the reference encoder with two caches.

Text is split into chunks, mostly a word with its space and punctuation, and each chunk is looked up. Chunks that are
missing are split into pre-tokens, and the pre-tokens that are missing as well are segmented, all in one batch.
Constants here only affect speed: the ids are those of `tokenizer.portable.reference.encode_reference`.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING

from tokenizer.encoding.unicode import text_to_bytes
from tokenizer.portable.pretokens import split_blocks, split_chunks, split_pretokens
from tokenizer.portable.reference import segment_data
from tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizer.portable.batch import BatchMerger

_BLOCK = 1 << 17
"""Characters whose missing chunks are segmented together."""
_TEXTS_AT_ONCE = 4096
CACHE_LIMIT = 48 << 20
"""Upper bound in bytes for the estimated size of both caches, which are emptied when they would exceed it."""
_MAX_CACHED = 64
"""Characters of the longest chunk or pre-token that is cached."""
_MIN_BATCH = 24
"""Number of pre-tokens from which NumPy is faster than plain Python."""
_MAX_BATCHED = 192
"""Bytes of the longest pre-token in a batch, whose rounds are as many as its merges."""


class PortableEncoder:
    """Encodes text with one portable vocabulary. Safe to use from several threads at once.

    Args:
        vocabulary: The vocabulary to encode with.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._chunks: dict[str, bytes] = {}
        self._pretokens: dict[str, bytes] = {}
        self._cache_bytes = 0
        self._lock = Lock()

    def ids(self, text: str) -> bytes:
        """Return the ids of a text, as the bytes of an int32 array."""
        if len(text) <= _BLOCK:
            return self._encode_together([text])[0]
        return b"".join(self._encode_together([block])[0] for block in split_blocks(text, _BLOCK))

    def ids_of_many(self, texts: Sequence[str]) -> list[bytes]:
        """Return `ids` of each text, in much less time where the texts are short."""
        rows: list[bytes] = []
        group: list[str] = []
        size = 0
        for text in texts:
            if len(text) > _BLOCK:
                rows += self._encode_together(group)
                rows.append(self.ids(text))
                group = []
                size = 0
                continue
            group.append(text)
            size += len(text)
            if size > 2 * _BLOCK or len(group) == _TEXTS_AT_ONCE:
                rows += self._encode_together(group)
                group = []
                size = 0
        return rows + self._encode_together(group)

    def _encode_together(self, texts: list[str]) -> list[bytes]:
        """Return the ids of each text; what is not cached is segmented in one batch."""
        cached = self._chunks.get
        split = [split_chunks(text) for text in texts]
        found = [list(map(cached, chunks)) for chunks in split]
        missing = {
            chunk
            for chunks, row in zip(split, found, strict=True)
            if None in row
            for chunk, ids in zip(chunks, row, strict=True)
            if ids is None
        }
        if missing:
            new = self._encode_chunks(list(missing))
            found = [
                [new[chunk] if ids is None else ids for chunk, ids in zip(chunks, row, strict=True)]
                if None in row
                else row
                for chunks, row in zip(split, found, strict=True)
            ]
        return [b"".join(row) for row in found]  # type: ignore[arg-type]  # no None is left

    def _encode_chunks(self, chunks: list[str]) -> dict[str, bytes]:
        """Return the ids of distinct chunks, and cache those that are short."""
        cached = self._pretokens.get
        split = [split_pretokens(chunk) for chunk in chunks]
        distinct = dict.fromkeys(chain.from_iterable(split))
        ids = dict(zip(distinct, map(cached, distinct), strict=True))
        missing = [pretoken for pretoken, known in ids.items() if known is None]
        if missing:
            new = dict(zip(missing, self._segment(missing), strict=True))
            ids.update(new)
            self._store(self._pretokens, new)
        result = {chunk: b"".join([ids[part] for part in parts]) for chunk, parts in zip(chunks, split, strict=True)}  # type: ignore[misc]  # no None is left
        self._store(self._chunks, result)
        return result

    def _segment(self, pretokens: list[str]) -> list[bytes]:
        data = [text_to_bytes(pretoken) for pretoken in pretokens]
        vocabulary = self.vocabulary
        if len(data) < _MIN_BATCH:
            return [array("i", segment_data(word, vocabulary)).tobytes() for word in data]
        whole = self._whole_words.get
        results = list(map(whole, data))
        batched = []
        for index, (word, ids) in enumerate(zip(data, results, strict=True)):
            if ids is None:
                if len(word) > _MAX_BATCHED:
                    results[index] = array("i", segment_data(word, vocabulary)).tobytes()
                else:
                    batched.append(index)
        if batched:
            for index, ids in zip(batched, self._batch.merge([data[index] for index in batched]), strict=True):
                results[index] = ids
        return results  # type: ignore[return-value]  # no None is left

    @cached_property
    def _whole_words(self) -> dict[bytes, bytes]:
        return {data: array("i", (id_,)).tobytes() for data, id_ in self.vocabulary.id_of_data.items()}

    @cached_property
    def _batch(self) -> BatchMerger:
        from tokenizer.portable.batch import BatchMerger  # imports NumPy, which short texts do not need

        return BatchMerger(self.vocabulary)

    def _store(self, cache: dict[str, bytes], new: dict[str, bytes]) -> None:
        """Add short entries to one of the two caches, emptying both first where the limit would be exceeded."""
        new = {text: ids for text, ids in new.items() if len(text) <= _MAX_CACHED}
        size = sum(map(sys.getsizeof, new)) + sum(map(len, new.values())) + 160 * len(new)
        with self._lock:
            if self._cache_bytes + size > CACHE_LIMIT:
                self._chunks.clear()
                self._pretokens.clear()
                self._cache_bytes = 0
            if size <= CACHE_LIMIT:
                cache.update(new)
                self._cache_bytes += size
