"""Texts are encoded in blocks; the words of the blocks are those of the text, and blocks are of bounded size."""

import random

import pytest

from tests.test_tokenizer.conftest import make
from tokenizer import HybridTokenizer
from tokenizer.encoding import base_encoder, bulk, pretokenization
from tokenizer.encoding.pretokenization import MAX_PRETOKEN, iterate_pretokens
from tokenizer.portable import pretokens as portable_pretokens
from tokenizer.portable.pretokens import split_pretokens

# Letters of contractions and others, numbers, punctuation, white space: every class of both kinds of pre-tokenization.
ALPHABET = "strvelmdSTRé中\u05d0\U0001040012\u0664½''.-,!…、\ud800\U0001f642\x00\u0301 \n\r\t\u00a0\u3000\x1c\u2028"
# Function that divides a text, smallest size of a block, function that gives the words of a text.
MODES = {
    "marks": (pretokenization.blocks_to_encode, MAX_PRETOKEN + 1, lambda text: list(iterate_pretokens(text))),
    "portable": (portable_pretokens.blocks_to_encode, 1, split_pretokens),
}


def random_text(source: random.Random) -> str:
    """Return a text of up to 300 characters, some of them much more common than others."""
    weights = [source.random() ** 4 for _ in ALPHABET]
    length = source.choice([5, 20, 60, 300])
    return "".join(source.choices(ALPHABET, weights, k=source.randrange(1, length)))


def compare(mode: str, count: int) -> None:
    """Compare the words of random texts with those of blocks that end wherever they can, and at fewer places."""
    blocks_to_encode, smallest, words_of = MODES[mode]
    source = random.Random(11)
    num_blocks = 0
    for _ in range(count):
        text = random_text(source)
        expected = words_of(text)
        for size in (smallest, source.randrange(smallest, 100)):
            blocks = list(blocks_to_encode(text, size))
            assert [word for block in blocks for word in words_of(block)] == expected, (text, size)
            num_blocks += len(blocks)
    assert num_blocks > 2.5 * count  # two would be those of no division


@pytest.mark.parametrize("mode", MODES)
def test_words_of_blocks(mode):
    compare(mode, 2_000)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_words_of_blocks_of_a_quarter_million_texts(mode):
    compare(mode, 250_000)


@pytest.mark.parametrize("portable", [False, True])
def test_ids_of_blocks(portable, monkeypatch):
    """Ids of long random texts do not depend on the size of a block."""
    monkeypatch.setattr(base_encoder, "MIN_FIRST_BULK", 0)
    vocabulary = make(portable=portable)._vocabulary
    source = random.Random(12)
    for _ in range(5):
        text = "".join(random_text(source) for _ in range(100))
        expected = HybridTokenizer.from_vocabulary(vocabulary).encode(text)
        with monkeypatch.context() as context:
            context.setattr(bulk, "_BLOCK", 150)
            assert HybridTokenizer.from_vocabulary(vocabulary).encode(text) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", ["中文字、" * 900, "var a=[1,2];" * 300, "word," * 800, "a\n" * 2000, "x\t" * 2000])
def test_blocks_are_bounded_without_spaces(mode, text):
    assert max(map(len, MODES[mode][0](text, 100))) <= 100 + MAX_PRETOKEN


def test_one_block_needs_no_pattern():
    """Compiling the pattern takes longer than encoding a short text."""
    portable_pretokens._block_end.cache_clear()
    for text in ("", "a", "a b" * 33, "a b " * 25):
        assert list(portable_pretokens.blocks_to_encode(text, 100)) == [text]
    assert not portable_pretokens._block_end.cache_info().misses
    assert len(list(portable_pretokens.blocks_to_encode("a b " * 26, 100))) == 2
    assert portable_pretokens._block_end.cache_info().misses == 1
