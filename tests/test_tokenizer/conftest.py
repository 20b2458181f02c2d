"""Tokenizers shared by the tests."""

import pytest

from tests.test_tokenizer.samples import corpus
from tokenizer import HybridTokenizer


def make(lowercase: bool = True, **options) -> HybridTokenizer:
    """Return a tokenizer trained on the test corpus."""
    tok = HybridTokenizer(lowercase=lowercase)
    tok.add_text(corpus())
    tok.freeze_vocab(**({"vocab_size": 900} | options))
    return tok


@pytest.fixture(scope="session", params=["marks", "cased", "phrases", "bytes"])
def tok(request: pytest.FixtureRequest) -> HybridTokenizer:
    """A tokenizer with case marks, with case in the entries, with phrases, and with almost no learned entries."""
    if request.param == "marks":
        return make()
    if request.param == "cased":
        return make(lowercase=False)
    if request.param == "phrases":
        return make(phrases=0.2, boundaries="spaces")
    tiny = HybridTokenizer()
    tiny.add_text("aa bb")
    tiny.freeze_vocab()
    return tiny
