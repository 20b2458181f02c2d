"""Text to ids, fast: the reference encoder with caches of pre-tokens.

Short texts are encoded in plain Python, long ones and many at once with NumPy. Constants and special cases here only
affect speed: the ids are those of `tokenizer.encoding.reference.encode_reference`, which
tests/test_tokenizer/test_roundtrip.py checks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from tokenizer.encoding.pretokenization import iterate_pretokens
from tokenizer.encoding.reference import segment_pretoken
from tokenizer.encoding.short_cache import MIN_BULK, ShortCache
from tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizer.encoding.bulk import BulkEncoder


class Encoder:
    """Encodes text with one vocabulary. Safe to use from several threads at once.

    Args:
        vocabulary: The vocabulary to encode with.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._cache = ShortCache(self._segment)

    def ids(self, text: str) -> bytes:
        """Return the ids of a text before phrases are joined, as the bytes of an int32 array."""
        if len(text) >= MIN_BULK:
            return self._bulk.ids(text)
        return self._cache.ids(list(iterate_pretokens(text)))

    def ids_of_many(self, texts: Sequence[str]) -> list[bytes]:
        """Return `ids` of each text, in much less time where the texts are short."""
        if sum(map(len, texts)) >= MIN_BULK:
            return self._bulk.ids_of_many(texts)
        return list(map(self.ids, texts))

    def _segment(self, pretoken: str) -> bytes:
        # Building all edges takes longer than segmenting a few pre-tokens without them.
        look_up = self.vocabulary.edges.get if "edges" in self.vocabulary.__dict__ else self.vocabulary.edge
        return array("i", segment_pretoken(pretoken, self.vocabulary, look_up)).tobytes()

    @cached_property
    def _bulk(self) -> BulkEncoder:
        from tokenizer.encoding.batch import bulk_encoder  # imports NumPy, which short texts do not need

        return bulk_encoder(self.vocabulary)
