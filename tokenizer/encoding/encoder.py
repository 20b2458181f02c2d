"""Text to ids, fast: the reference encoder with caches of pre-tokens.

Short texts are encoded in plain Python, long ones and many at once with NumPy. Constants and special cases here only
affect speed: the ids are those of `tokenizer.encoding.reference.encode_reference`, which
tests/test_tokenizer/test_roundtrip.py checks.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from tokenizer.encoding.base_encoder import BaseEncoder
from tokenizer.encoding.pretokenization import iterate_pretokens
from tokenizer.encoding.reference import segment_pretoken

if TYPE_CHECKING:
    from tokenizer.encoding.bulk import BulkEncoder


class Encoder(BaseEncoder):
    """The encoder of tokenizers that are not portable."""

    def _words(self, text: str) -> list[str]:
        return list(iterate_pretokens(text))

    def _segment(self, word: str) -> bytes:
        # Building all edges takes longer than segmenting a few pre-tokens without them.
        look_up = self.vocabulary.edges.get if "edges" in self.vocabulary.__dict__ else self.vocabulary.edge
        return array("i", segment_pretoken(word, self.vocabulary, look_up)).tobytes()

    def _make_bulk(self) -> BulkEncoder:
        from tokenizer.encoding.batch import bulk_encoder

        return bulk_encoder(self.vocabulary)
