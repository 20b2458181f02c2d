"""Text to ids with a portable vocabulary, fast: the reference encoder with two caches.

Text is split into chunks, mostly a word with its space and punctuation, and each chunk is looked up. Chunks that are
missing are split into pre-tokens, and the pre-tokens that are missing as well are segmented, all in one batch.
Constants here only affect speed: the ids are those of `tokenizer.portable.reference.encode_reference`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING

from tokenizer.encoding.encoder import ENTRY_BYTES
from tokenizer.encoding.unicode import text_to_bytes
from tokenizer.portable.pretokens import (
    END_OF_TEXT,
    find_unusual,
    split_blocks,
    split_chunks,
    split_many,
    split_pretokens,
)
from tokenizer.portable.reference import segment_data
from tokenizer.vocabulary import FIRST_BYTE, Vocabulary

if TYPE_CHECKING:
    from tokenizer.portable.batch import BatchMerger

_FIRST_BLOCK = 1 << 15
_BLOCK = 1 << 19
"""Characters whose missing chunks are segmented together: few at first, when nearly everything is missing."""
_LOOKUP_BLOCK = 1 << 13
"""Characters that are split and looked up at once: the chunks are then still in the processor's cache."""
_END_OF_IDS = b"\xff\xfe\xfd\xfc"
"""Between ids: no part of it and of ids next to it, which are below 2**24, is equal to it, in either byte order."""
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
        return b"".join([self._encode_together([block])[0] for block in split_blocks(text, _FIRST_BLOCK, _BLOCK)])

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

    def _encode_together(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text; what is not cached is segmented in one batch."""
        cached = self._chunks.get
        blocks = [list(split_blocks(text, _LOOKUP_BLOCK)) for text in texts]
        split = []
        found = []
        missing: set[str] = set()
        for block in chain.from_iterable(blocks):
            chunks = split_chunks(block)
            ids = list(map(cached, chunks))
            if None in ids:
                missing.update([chunk for chunk, known in zip(chunks, ids, strict=True) if known is None])
            split.append(chunks)
            found.append(ids)
        if missing:
            new = self._encode_chunks(list(missing))
            for chunks, ids in zip(split, found, strict=True):
                if None in ids:
                    ids[:] = [new[chunk] if known is None else known for chunk, known in zip(chunks, ids, strict=True)]
        rows = iter(found)
        return [b"".join([b"".join(next(rows)) for _ in own_blocks]) for own_blocks in blocks]  # type: ignore[arg-type]  # no None is left

    def _encode_chunks(self, chunks: list[str]) -> dict[str, bytes]:
        """Return the ids of distinct chunks, and cache those that are short.

        All chunks are split at once, and their ids joined at once: the ids of a chunk are what is between two marks.
        """
        result: dict[str, bytes] = {}
        pretokens = split_many(chunks)
        if pretokens is None:
            unusual = list(filter(find_unusual, chunks))
            usual = list(set(chunks).difference(unusual))
            split = list(map(split_pretokens, unusual))
            ids = self._encode_pretokens(set(chain.from_iterable(split)))
            result.update(zip(unusual, (b"".join([ids[part] for part in parts]) for parts in split), strict=True))
            chunks = usual
            pretokens = split_many(chunks) or []
        ids = self._encode_pretokens(set(pretokens) - {END_OF_TEXT})
        ids[END_OF_TEXT] = _END_OF_IDS
        rows = b"".join(map(ids.__getitem__, pretokens)).split(_END_OF_IDS)
        result.update(zip(chunks, rows, strict=bool(chunks)))
        self._store(self._chunks, result)
        return result

    def _encode_pretokens(self, pretokens: set[str]) -> dict[str, bytes]:
        """Return the ids of pre-tokens, and cache those that are short."""
        ids = dict(zip(pretokens, map(self._pretokens.get, pretokens), strict=True))
        missing = [pretoken for pretoken, known in ids.items() if known is None]
        if missing:
            new = dict(zip(missing, self._segment(missing), strict=True))
            ids.update(new)
            self._store(self._pretokens, new)
        return ids  # type: ignore[return-value]  # no None is left

    def _segment(self, pretokens: list[str]) -> list[bytes]:
        data = [pretoken.encode("utf-8", "surrogatepass") for pretoken in pretokens]
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

        # An entry that is one pre-token is its own segmentation: fill the cache with them.
        vocabulary = self.vocabulary
        words = {text: self._whole_words[text_to_bytes(text)] for text in vocabulary.texts[FIRST_BYTE:] if text}
        self._store(self._chunks, {text: ids for text, ids in words.items() if split_pretokens(text) == [text]})
        return BatchMerger(vocabulary)

    def _store(self, cache: dict[str, bytes], new: dict[str, bytes]) -> None:
        """Add short entries to one of the two caches, emptying both first where the limit would be exceeded."""
        if max(map(len, new), default=0) > _MAX_CACHED:
            new = {text: ids for text, ids in new.items() if len(text) <= _MAX_CACHED}
        size = 4 * sum(map(len, new)) + sum(map(len, new.values())) + ENTRY_BYTES * len(new)
        with self._lock:
            if self._cache_bytes + size > CACHE_LIMIT:
                self._chunks.clear()
                self._pretokens.clear()
                self._cache_bytes = 0
            if size <= CACHE_LIMIT:
                cache.update(new)
                self._cache_bytes += size
