"""Text to ids with a portable vocabulary, fast: the reference encoder with caches of pre-tokens.

Short texts are encoded in plain Python, long ones and many at once with NumPy. Constants here only affect speed: the
ids are those of `tokenizer.portable.reference.encode_reference`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from tokenizer.encoding.short_cache import MIN_BULK, ShortCache
from tokenizer.encoding.unicode import text_to_bytes
from tokenizer.portable.pretokens import split_pretokens
from tokenizer.portable.reference import segment_data
from tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizer.encoding.bulk import BulkEncoder


class PortableEncoder:
    """Encodes text with one portable vocabulary. Safe to use from several threads at once.

    Args:
        vocabulary: The vocabulary to encode with.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._cache = ShortCache(self._segment)

    def ids(self, text: str) -> bytes:
        """Return the ids of a text, as the bytes of an int32 array."""
        if len(text) >= MIN_BULK:
            return self._bulk.ids(text)
        return self._cache.ids(split_pretokens(text))

    def ids_of_many(self, texts: Sequence[str]) -> list[bytes]:
        """Return `ids` of each text, in much less time where the texts are short."""
        if sum(map(len, texts)) >= MIN_BULK:
            return self._bulk.ids_of_many(texts)
        return list(map(self.ids, texts))

    def _segment(self, pretoken: str) -> bytes:
        return array("i", segment_data(text_to_bytes(pretoken), self.vocabulary)).tobytes()

    @cached_property
    def _bulk(self) -> BulkEncoder:
        from tokenizer.portable.batch import bulk_encoder  # imports NumPy, which short texts do not need

        return bulk_encoder(self.vocabulary)
