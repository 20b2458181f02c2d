"""Ids to text, whole or as they come."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

from tokenizer.errors import TokenizerError
from tokenizer.units import bytes_to_text, unfinished_tail
from tokenizer.vocabulary import FIRST_BYTE, NL, SP, Vocabulary

if TYPE_CHECKING:
    import numpy as np

    from tokenizer.decoding.batch_decode import BatchDecoder


class Decoder:
    """Decodes with one vocabulary; may be used from several threads at once."""

    def __init__(self, vocabulary: Vocabulary, show_special: bool = False) -> None:
        self.vocabulary = vocabulary
        self._show_special = show_special

    @cached_property
    def table(self) -> list[bytes]:
        """The bytes of each id without a case mark before it."""
        data = list(self.vocabulary.data)
        if self._show_special:
            for id_ in range(FIRST_BYTE):
                if id_ not in (SP, NL):
                    data[id_] = self.vocabulary.names[id_].encode()
        return data

    @cached_property
    def _batch(self) -> BatchDecoder:
        from tokenizer.decoding.batch_decode import BatchDecoder  # imports NumPy, which short texts do without

        return BatchDecoder(self.vocabulary, self.table)

    def array_to_text(self, ids: np.ndarray) -> str:
        """The text of ids (int [T]); equal to `to_text`."""
        data = self._batch.decode(ids)
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            return bytes_to_text(data)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for: each id by itself, or with the case mark right before it."""
        table, vocabulary = self.table, self.vocabulary
        up, caps = vocabulary.up, vocabulary.caps
        out, mark = [], -1
        for id_ in ids:
            out.append(table[id_] if mark < 0 else vocabulary.marked_data(id_, mark))
            mark = id_ if id_ in (up, caps) and id_ >= 0 else -1
        return b"".join(out)

    def to_text(self, ids: Iterable[int]) -> str:
        """The text that ids stand for; bytes that are no UTF-8 become U+FFFD."""
        return bytes_to_text(self.to_bytes(ids))


class StreamDecoder:
    """Text out of ids that come one by one, never half a character.

    The concatenation of everything that `push` and `finish` return is the text of all ids together.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._pending = b""
        self._mark = -1

    def push(self, id_: int) -> str:
        """Take one id (int); return the text (str) that is certain by now and was not returned before."""
        vocabulary = self._decoder.vocabulary
        id_ = int(id_)
        if not 0 <= id_ < vocabulary.size:
            raise_unknown_id(id_, vocabulary.size)
        data = self._decoder.table[id_] if self._mark < 0 else vocabulary.marked_data(id_, self._mark)
        self._mark = id_ if id_ in (vocabulary.up, vocabulary.caps) and id_ >= 0 else -1
        data = self._pending + data
        tail = unfinished_tail(data)
        self._pending = data[len(data) - tail :]
        return bytes_to_text(data[: len(data) - tail])

    def finish(self) -> str:
        """The rest: "" unless the ids ended inside a character. The decoder can then be used for other ids."""
        rest, self._pending, self._mark = self._pending, b"", -1
        return bytes_to_text(rest)


def raise_unknown_id(id_: int, size: int) -> None:
    """Raise the error for an id outside the vocabulary."""
    raise TokenizerError(f"{id_} is no id of this tokenizer: its ids are 0 to {size - 1}")
