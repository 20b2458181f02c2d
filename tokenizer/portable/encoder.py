"""Text to ids with a portable vocabulary, fast: the reference encoder with caches of pre-tokens.

Short texts are encoded in plain Python, long ones and many at once with NumPy. Constants here only affect speed: the
ids are those of `tokenizer.portable.reference.encode_reference`.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from tokenizer.encoding.base_encoder import BaseEncoder
from tokenizer.encoding.unicode import text_to_bytes
from tokenizer.portable.pretokens import split_pretokens
from tokenizer.portable.reference import segment_data

if TYPE_CHECKING:
    from tokenizer.encoding.bulk import BulkEncoder


class PortableEncoder(BaseEncoder):
    """The encoder of portable tokenizers."""

    def _words(self, text: str) -> list[str]:
        return split_pretokens(text)

    def _segment(self, word: str) -> bytes:
        return array("i", segment_data(text_to_bytes(word), self.vocabulary)).tobytes()

    def _make_bulk(self) -> BulkEncoder:
        from tokenizer.portable.batch import bulk_encoder

        return bulk_encoder(self.vocabulary)
