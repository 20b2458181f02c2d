"""Ids to text, all at once or as a stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizer.encoding.unicode import bytes_to_text, incomplete_tail_length
from tokenizer.errors import TokenizerError
from tokenizer.once import made_once
from tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np

    from tokenizer.decoding.batch import BatchDecoder


class Decoder:
    """Decodes ids with one vocabulary. Safe to use from several threads at once.

    Args:
        vocabulary: The vocabulary of the ids.
        show_special: Decode special tokens to their names instead of to nothing.
    """

    def __init__(self, vocabulary: Vocabulary, show_special: bool = False) -> None:
        self.vocabulary = vocabulary
        self._show_special = show_special

    @made_once
    def table(self) -> list[bytes]:
        """The bytes of each id without a case mark before it, [V]."""
        data = list(self.vocabulary.data)
        if self._show_special:
            for id_ in self.vocabulary.special_ids:
                data[id_] = self.vocabulary.names[id_].encode()
        return data

    @made_once
    def _batch(self) -> BatchDecoder:
        from tokenizer.decoding.batch import BatchDecoder  # imports NumPy, which short texts do not need

        return BatchDecoder(self.vocabulary, self.table)

    def array_to_text(self, ids: np.ndarray) -> str:
        """Return the text of ids (int [T]); equal to `to_text`.

        Raises:
            TokenizerError: An id is outside the vocabulary.
        """
        if len(ids):
            self._check_range(int(ids.min()), int(ids.max()))
        data = self._batch.decode(ids)
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            return bytes_to_text(data)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids, with case marks applied.

        Raises:
            TokenizerError: An id is outside the vocabulary.
        """
        ids = ids if isinstance(ids, list) else list(ids)
        if ids:
            self._check_range(min(ids), max(ids))
        table = self.table
        vocabulary = self.vocabulary
        case_marks = vocabulary.case_marks
        out = []
        mark = -1
        for id_ in ids:
            out.append(table[id_] if mark < 0 else vocabulary.marked_data(id_, mark))
            mark = id_ if id_ in case_marks else -1
        return b"".join(out)

    def to_text(self, ids: Iterable[int]) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD.

        Raises:
            TokenizerError: An id is outside the vocabulary.
        """
        return bytes_to_text(self.to_bytes(ids))

    def _check_range(self, lowest: int, highest: int) -> None:
        """Raise TokenizerError for an id outside the vocabulary: a negative one would index from the end."""
        for id_ in (lowest, highest):
            if not 0 <= id_ < self.vocabulary.size:
                raise_unknown_id(id_, self.vocabulary.size)


class StreamDecoder:
    """Decodes ids one by one without ever returning part of a character.

    The concatenation of everything that `push` and `finish` return is the text of all ids.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._pending = b""
        self._mark = -1

    def push(self, id_: int) -> str:
        """Add one id; return the text that is complete now and was not returned before.

        Raises:
            TokenizerError: The id is outside the vocabulary.
        """
        vocabulary = self._decoder.vocabulary
        id_ = int(id_)
        if not 0 <= id_ < vocabulary.size:
            raise_unknown_id(id_, vocabulary.size)
        data = self._decoder.table[id_] if self._mark < 0 else vocabulary.marked_data(id_, self._mark)
        self._mark = id_ if id_ in vocabulary.case_marks else -1
        data = self._pending + data
        complete = len(data) - incomplete_tail_length(data)
        self._pending = data[complete:]
        return bytes_to_text(data[:complete])

    def finish(self) -> str:
        """Return the remaining text ("" unless the ids end inside a character) and reset the decoder."""
        rest = self._pending
        self._pending = b""
        self._mark = -1
        return bytes_to_text(rest)


def raise_unknown_id(id_: int, size: int) -> None:
    """Raise the error for an id outside a vocabulary of `size` ids."""
    raise TokenizerError(f"{id_} is not an id of this tokenizer: its ids are 0 to {size - 1}")
