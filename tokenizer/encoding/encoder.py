"""Text to ids, fast: the reference encoder with a cache of pre-tokens.

Text is split into pre-tokens by `str.split` where its white space is plain and by a regular expression elsewhere. Every
pre-token is looked up in the cache; the ones that are missing are segmented, all of a block in one batch. Constants and
special cases here only affect speed: the ids are those of `tokenizer.encoding.reference.encode_reference`, which
tests/test_tokenizer/test_roundtrip.py checks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from tokenizer.encoding.pretokenization import (
    MAX_PRETOKEN,
    SEPARATORS,
    UNSPLIT_RUNS,
    expand,
    split_any,
    split_blocks,
    split_first_word,
    split_long_pretoken,
    split_plain,
)
from tokenizer.encoding.reference import segment_pretoken
from tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizer.encoding.batch import BatchSegmenter

_FIRST_BLOCK = 1 << 14
_MAX_BLOCK = 1 << 20
"""Characters after which cache misses are segmented: few at first, when nearly everything is a miss, then more."""
_LOOKUP_BLOCK = 1 << 12
"""Characters that are split and looked up at once: the pieces are then still in the processor's cache."""
_TEXTS_AT_ONCE = 4096
"""Texts of `encode_many` whose cache misses are segmented together."""
CACHE_LIMIT = 48 << 20
"""Upper bound in bytes for the estimated size of the cache, which is emptied when it would exceed it."""
ENTRY_BYTES = 200
"""Bytes of an entry of a cache other than its characters, of at most four bytes each, and its ids."""
_MIN_BATCH = 64
"""Number of pre-tokens from which NumPy is faster than plain Python."""


class _Lookup(NamedTuple):
    """Pre-tokens in short form, the indices of those that are not cached, and their ids (None where not cached)."""

    pretokens: list[str]
    missing: list[int]
    ids: list[bytes | None]


class Encoder:
    """Encodes text with one vocabulary. Safe to use from several threads at once.

    Args:
        vocabulary: The vocabulary to encode with.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        # Keyed by short form. White space alone is never cached: this is how runs of it are noticed in `_look_up`.
        self._cache: dict[str, bytes] = {}
        # Keyed by plain text: words at the start of a text, and parts of long pre-tokens.
        self._cache_of_parts: dict[str, bytes] = {}
        self._cache_bytes = 0
        self._lock = Lock()

    def ids(self, text: str) -> bytes:
        """Return the ids of a text before phrases are joined, as the bytes of an int32 array."""
        word, rest = split_first_word(text)
        result = self._encode_parts(split_long_pretoken(word)) if word else []
        if rest:
            for block in split_blocks(rest, _FIRST_BLOCK, _MAX_BLOCK):
                rows = self._look_up(split_blocks(block, _LOOKUP_BLOCK))
                result += [b"".join(row) for row in rows]
        return b"".join(result)

    def ids_of_many(self, texts: Sequence[str]) -> list[bytes]:
        """Return `ids` of each text, in much less time where the texts are short."""
        split = [split_first_word(text) for text in texts]
        words = [split_long_pretoken(word) if word else [] for word, _ in split]
        encoded = iter(self._encode_parts([part for parts in words for part in parts]))
        rows = [[next(encoded) for _ in parts] for parts in words]
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            blocks = [list(split_blocks(rest, _LOOKUP_BLOCK)) for _, rest in split[first : first + _TEXTS_AT_ONCE]]
            encoded_blocks = iter(self._look_up(chain.from_iterable(blocks)))
            for row, own_blocks in zip(rows[first:], blocks, strict=False):
                row += [b"".join(next(encoded_blocks)) for _ in own_blocks]
        return [b"".join(row) for row in rows]

    def _look_up(self, texts: Iterable[str]) -> list[list[bytes]]:
        """Return the ids of the pre-tokens of each text; the texts start with white space or are empty."""
        cached = self._cache.get
        rows: list[list[bytes | None]] = []
        incomplete: list[_Lookup] = []
        has_runs = False  # whether the text before had runs of white space: then this one probably has some as well
        for text in texts:
            pretokens = split_any(text) if has_runs else split_plain(text)
            ids = list(map(cached, pretokens))
            missing = _indices_of_none(ids)
            if missing and not has_runs and not UNSPLIT_RUNS.isdisjoint([pretokens[index] for index in missing]):
                pretokens = split_any(text)
                ids = list(map(cached, pretokens))
                missing = _indices_of_none(ids)
                has_runs = True
            elif has_runs:
                has_runs = "  " in text or "\n " in text
            if missing:
                incomplete.append(_Lookup(pretokens, missing, ids))
            rows.append(ids)
        if incomplete:
            new = self._encode_missing({lookup.pretokens[index] for lookup in incomplete for index in lookup.missing})
            for pretokens, missing, ids in incomplete:
                for index in missing:
                    ids[index] = new[pretokens[index]]
        return rows  # type: ignore[return-value]  # no None is left

    def _encode_missing(self, pretokens: set[str]) -> dict[str, bytes]:
        """Return the ids of pre-tokens in short form; cache those that are not too long."""
        short = [pretoken for pretoken in pretokens if len(pretoken) < MAX_PRETOKEN]
        long = [pretoken for pretoken in pretokens if len(pretoken) >= MAX_PRETOKEN]
        parts_of_long = [split_long_pretoken(expand(pretoken)) for pretoken in long]
        texts = [pretoken if pretoken[:1] in SEPARATORS else " " + pretoken for pretoken in short]  # `expand`
        for parts in parts_of_long:
            texts += parts
        ids = self._encode_parts(texts, len(short))
        new = dict(zip(short, ids, strict=False))
        self._store(self._cache, {pretoken: value for pretoken, value in new.items() if pretoken.strip(" \n")})
        position = len(short)
        for pretoken, parts in zip(long, parts_of_long, strict=True):
            new[pretoken] = b"".join(ids[position : position + len(parts)])
            position += len(parts)
        return new

    def _encode_parts(self, texts: list[str], uncached: int = 0) -> list[bytes]:
        """Return the ids of texts of at most `MAX_PRETOKEN` characters; the first `uncached` bypass the cache."""
        cache = self._cache_of_parts
        cacheable = texts[uncached:]
        known = [cache.get(text) for text in cacheable]
        missing = list(dict.fromkeys(text for text, ids in zip(cacheable, known, strict=True) if ids is None))
        ids = self._segment(texts[:uncached] + missing)
        if missing:
            new = dict(zip(missing, ids[uncached:], strict=True))
            self._store(cache, new)
            known = [new[text] if old is None else old for text, old in zip(cacheable, known, strict=True)]
        return ids[:uncached] + known  # type: ignore[operator]

    def _segment(self, texts: list[str]) -> list[bytes]:
        if len(texts) >= _MIN_BATCH:
            return self._batch.segment(texts)
        # Building all edges takes longer than segmenting a few texts without them.
        look_up = self.vocabulary.edges.get if "_batch" in self.__dict__ else self.vocabulary.edge
        return [array("i", segment_pretoken(text, self.vocabulary, look_up)).tobytes() for text in texts]

    @cached_property
    def _batch(self) -> BatchSegmenter:
        from tokenizer.encoding.batch import BatchSegmenter  # imports NumPy, which short texts do not need

        # An entry, or a case mark and an entry, is its own segmentation: fill the cache with them.
        known = {
            text[1:]: array("i", ids).tobytes()
            for text, ids in self.vocabulary.edges.items()
            if text[0] == " " and len(text) > 1 and text[1] not in SEPARATORS and ids[0] != self.vocabulary.caps
        }
        self._store(self._cache, known)
        return BatchSegmenter(self.vocabulary)

    def _store(self, cache: dict[str, bytes], new: dict[str, bytes]) -> None:
        """Add entries to one of the two caches, emptying both first where the limit would be exceeded."""
        size = 4 * sum(map(len, new)) + sum(map(len, new.values())) + ENTRY_BYTES * len(new)
        with self._lock:
            if self._cache_bytes + size > CACHE_LIMIT:
                self._cache.clear()
                self._cache_of_parts.clear()
                self._cache_bytes = 0
            if size <= CACHE_LIMIT:
                cache.update(new)
                self._cache_bytes += size


def _indices_of_none(values: list[bytes | None]) -> list[int]:
    indices: list[int] = []
    if None not in values:
        return indices
    index = -1
    try:
        while True:  # list.index is much faster than a comprehension where few values are None
            index = values.index(None, index + 1)
            indices.append(index)
    except ValueError:
        return indices
