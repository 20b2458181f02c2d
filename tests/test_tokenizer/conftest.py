"""Tokenizers shared by the tests."""

import pytest

from tests.test_tokenizer.samples import corpus
from tokenizer import HybridTokenizer
from tokenizer.encoding import reference
from tokenizer.portable import reference as portable_reference
from tokenizer.vocabulary import Vocabulary


def encode_reference(text: str, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of a text by definition."""
    encode = portable_reference.encode_reference if vocabulary.portable else reference.encode_reference
    return encode(text, vocabulary)


def make(lowercase: bool = True, portable: bool = False, **options) -> HybridTokenizer:
    """Return a tokenizer trained on the test corpus."""
    tok = HybridTokenizer(lowercase=lowercase, portable=portable)
    tok.add_text(corpus())
    tok.freeze_vocab(**({"vocab_size": 900} | options))
    return tok


@pytest.fixture(scope="session", params=["marks", "cased", "phrases", "bytes", "portable"])
def tok(request: pytest.FixtureRequest) -> HybridTokenizer:
    """A tokenizer with case marks, case in the entries, phrases, almost no learned entries, and a portable one."""
    if request.param == "marks":
        return make()
    if request.param == "cased":
        return make(lowercase=False)
    if request.param == "phrases":
        return make(phrases=0.2, boundaries="spaces")
    if request.param == "portable":
        return make(portable=True)
    tiny = HybridTokenizer()
    tiny.add_text("aa bb")
    tiny.freeze_vocab()
    return tiny
