"""Base class of the encoders of both kinds of tokenizers: the choice between plain Python and NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizer.encoding.short_cache import ShortCache
from tokenizer.once import made_once
from tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizer.encoding.bulk import BulkEncoder

MIN_BULK = 4096
"""Characters from which texts are encoded with NumPy, once its tables are built."""
MIN_FIRST_BULK = 65_536
"""Characters of such texts after which the tables are built, in about their time with `english-16k`."""


class BaseEncoder:
    """Encodes text with one vocabulary. Safe to use from several threads at once.

    A subclass splits texts into words, makes the ids of one word, and makes the encoder of long texts.

    Args:
        vocabulary: The vocabulary to encode with.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._cache = ShortCache(self._segment)
        self._size_without_tables = 0

    def ids(self, text: str) -> bytes:
        """Return the ids of a text before phrases are joined, as the bytes of an int32 array."""
        return self._bulk.ids(text) if self._uses_bulk(len(text)) else self._ids_of_words(text)

    def ids_of_many(self, texts: Sequence[str]) -> list[bytes]:
        """Return `ids` of each text, in much less time where the texts are short."""
        if self._uses_bulk(sum(map(len, texts))):
            return self._bulk.ids_of_many(texts)
        return list(map(self._ids_of_words, texts))

    def _uses_bulk(self, size: int) -> bool:
        """Return whether texts of so many characters are encoded with NumPy, and count those that wait for its tables.

        An update of the count that another thread overwrites delays the tables, no more.
        """
        if size < MIN_BULK or "_bulk" in self.__dict__:
            return size >= MIN_BULK
        self._size_without_tables += size
        return self._size_without_tables >= MIN_FIRST_BULK

    def _ids_of_words(self, text: str) -> bytes:
        return self._cache.ids(self._words(text))

    @made_once
    def _bulk(self) -> BulkEncoder:
        return self._make_bulk()

    def _words(self, text: str) -> list[str]:
        """Return the words of a text, which are encoded independently."""
        raise NotImplementedError

    def _segment(self, word: str) -> bytes:
        """Return the ids of a word, as the bytes of an int32 array."""
        raise NotImplementedError

    def _make_bulk(self) -> BulkEncoder:
        """Return the encoder of long texts; imports NumPy, which short texts do not need."""
        raise NotImplementedError
