"""Portable tokenizers: the definition against a naive twin, the fast ways against it, and `tokenizers` against both."""

import itertools
import json
import random
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_tokenizer.conftest import encode_reference, make
from tests.test_tokenizer.samples import EDGE_CASES, LANGUAGES, any_text, corpus
from tokenizer import HybridTokenizer, TokenizerError
from tokenizer.encoding import base_encoder, bulk
from tokenizer.encoding.unicode import text_to_bytes
from tokenizer.portable import character_tables
from tokenizer.portable.batch import BatchMerger
from tokenizer.portable.pretokens import (
    PATTERN,
    blocks_to_encode,
    count_pretokens,
    split_chunks,
    split_pretokens,
)
from tokenizer.portable.reference import merge_bytes, merge_long
from tokenizer.portable.tokenizer_json import to_tokenizer_json
from tokenizer.vocabulary import FIRST_BYTE, FIRST_LEARNED

PLAIN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""The pattern of Llama 3 with the character classes of the engine."""

white_space_text = st.text(st.sampled_from(" \n\t\r\u00a0\u0085\x1cab1'.sé \n"), max_size=14)
scalar_text = any_text.filter(lambda text: not re.search("[\ud800-\udfff]", text))


@pytest.fixture(scope="module")
def portable() -> HybridTokenizer:
    return make(portable=True)


@pytest.fixture(scope="module")
def theirs(portable):
    """The same tokenizer in the package `tokenizers`."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    return tokenizers.Tokenizer.from_str(json.dumps(to_tokenizer_json(portable._vocabulary)))


def members(ranges: str) -> set[int]:
    """Return the code points of a table."""
    result: set[int] = set()
    for item in ranges.split():
        first, _, last = item.partition("-")
        result.update(range(int(first, 16), int(last or first, 16) + 1))
    return result


# Pre-tokens


@pytest.mark.parametrize(("category", "ranges"), [("L", character_tables.LETTERS), ("N", character_tables.NUMBERS)])
def test_tables_are_those_of_unicode(category, ranges):
    """Compare with the tables of this Python, which may be older or newer."""
    table = members(ranges)
    here = {code for code in range(0x110000) if unicodedata.category(chr(code))[0] == category}
    version = [int(part) for part in unicodedata.unidata_version.split(".")]
    if version <= [15, 1, 0]:
        assert here <= table
    if version >= [15, 1, 0]:
        assert table <= here
    assert all(unicodedata.category(chr(code)) == "Cn" for code in table - here)


def test_white_space_is_that_of_regular_expressions():
    table = members(character_tables.WHITE_SPACE)
    assert table == {code for code in range(0x110000) if chr(code).isspace()} - set(range(0x1C, 0x20))


def test_pretokens_of_examples():
    assert split_pretokens("I'll don'T 12345 x\n\n  y.\n\n") == [
        *("I", "'ll", " don", "'T", " ", "123", "45", " x", "\n\n", " ", " y", ".\n\n"),
    ]
    assert split_pretokens("'\u017f \u1c89 <EOS>") == ["'\u017f", " \u1c89", " <", "EOS", ">"]


@settings(deadline=None)
@given(text=st.one_of(white_space_text, any_text))
def test_chunks_and_blocks_end_where_pretokens_end(text):
    pretokens = split_pretokens(text)
    assert pretokens == re.findall(PATTERN, text)
    assert "".join(pretokens) == text
    assert [part for chunk in split_chunks(text) for part in split_pretokens(chunk)] == pretokens
    for size in (1, 3):
        assert [part for block in blocks_to_encode(text, size) for part in split_pretokens(block)] == pretokens
    counts = sum(count_pretokens(text), start=type(next(count_pretokens("a")))())
    assert sum(len(part) * count for part, count in counts.items()) == len(text)


@settings(deadline=None)
@given(texts=st.lists(st.one_of(white_space_text, any_text), min_size=1, max_size=6))
def test_texts_are_split_together_as_alone(portable, texts):
    """NumPy finds the pre-tokens of the pattern, in each text of several."""
    words, words_before = portable._encoder._bulk._split(texts)
    rows = [split_pretokens(text) for text in texts]
    places = zip(words.starts.tolist(), words.stops.tolist(), strict=True)
    assert [words.text[start:stop] for start, stop in places] == list(itertools.chain.from_iterable(rows))
    assert words_before.tolist() == list(itertools.accumulate([0, *map(len, rows[:-1])]))
    places = zip(words.byte_starts.tolist(), words.lengths.tolist(), strict=True)
    data = [words.data[start : start + length].tobytes() for start, length in places]
    assert data == [text_to_bytes(pretoken) for row in rows for pretoken in row]


@pytest.mark.parametrize("unusual", ["", "\0", "\U0001f642", "\0\U0001f642\udc00"])
def test_many_new_words(portable, unusual, monkeypatch):
    """Encode enough new words, with and without unusual characters, for the ways that take many at once."""
    monkeypatch.setattr(base_encoder, "MIN_FIRST_BULK", 0)
    source = random.Random(3)
    words = ["".join(source.choices("abeht'1é\u05d0.,中", k=source.randrange(1, 9))) for _ in range(900)]
    text = " ".join(word + unusual if index % 3 else word for index, word in enumerate(words)) + unusual
    fresh = HybridTokenizer.from_vocabulary(portable._vocabulary)
    expected = encode_reference(text, portable._vocabulary)
    assert fresh.encode(text) == expected == fresh.encode(text)
    assert [ids.tolist() for ids in fresh.encode_arrays(words)] == [
        encode_reference(word, portable._vocabulary) for word in words
    ]


# Merges


def naive_bpe(data: bytes, merges) -> list[int]:
    """Apply the merges in the order of their ranks, each from left to right."""
    ids = [FIRST_BYTE + value for value in data]
    for id_, pair in merges:
        at = 0
        while at < len(ids) - 1:
            if (ids[at], ids[at + 1]) == pair:
                ids[at : at + 2] = [id_]
            at += 1
    return ids


@settings(deadline=None)
@given(data=st.data())
def test_merges_equal_a_naive_twin(portable, data):
    """A merge never makes a pair of a lower rank, so merging rank by rank is the same as the lowest rank first."""
    vocabulary = portable._vocabulary
    word = st.one_of(
        any_text.map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.lists(st.sampled_from(vocabulary.data[FIRST_BYTE:]), max_size=8).map(b"".join),
        st.text("the ", max_size=30).map(str.encode),
        st.binary(max_size=12),
    ).filter(len)
    words = data.draw(st.lists(word, min_size=1, max_size=6))
    ranked = list(enumerate(vocabulary.merges, start=vocabulary.first_merge))
    expected = [naive_bpe(word, ranked) for word in words]
    assert [merge_bytes(word, vocabulary.merge_ids) for word in words] == expected
    assert [merge_long(word, vocabulary.merge_ids) for word in words] == expected
    merger = BatchMerger(vocabulary)
    joined = np.frombuffer(b"".join(words) + b"\0", dtype=np.uint8)
    lengths = np.array(list(map(len, words)))
    for groups in (merger.merge(words), merger.merge_places(joined, np.cumsum(lengths) - lengths, lengths)):
        rows = {}
        for members, ids, counts in groups:
            parts = np.split(ids, np.cumsum(counts)[:-1])
            rows.update(zip(members.tolist(), [part.tolist() for part in parts], strict=True))
        assert [rows[index] for index in range(len(words))] == expected


def test_long_text_is_encoded_in_blocks(portable, monkeypatch):
    monkeypatch.setattr(base_encoder, "MIN_FIRST_BULK", 0)
    monkeypatch.setattr(bulk, "_BLOCK", 50)
    text = corpus()[:5000]
    fresh = HybridTokenizer.from_vocabulary(portable._vocabulary)
    assert fresh.encode(text) == encode_reference(text, portable._vocabulary)
    texts = [text, "", text[:20], text[20:400], "the"] * 3
    assert [ids.tolist() for ids in fresh.encode_arrays(texts)] == [portable.encode(text) for text in texts]


# Learning


def test_words_are_bases_where_no_merges_make_them(portable):
    vocabulary = portable._vocabulary
    assert len(vocabulary.bases) > 10
    for offset, base in enumerate(vocabulary.bases):
        id_ = vocabulary.first_base + offset
        assert portable.encode(base) == [id_]
        explanation = portable.explain_token(id_)
        assert len(explanation.parts) > 1
        assert b"".join(part.data for part in explanation.parts) == base.encode()


@pytest.mark.parametrize("size", [271, 272, 300, 700])
@pytest.mark.parametrize("options", [{}, {"k_bases": 30}, {"max_merges": 50}, {"score": "pmi"}, {"min_freq": 5}])
def test_sizes_and_options_are_respected(size, options):
    tok = make(portable=True, vocab_size=size, **options)
    kinds = tok.db_status().kinds
    assert tok.vocab_size <= size
    assert kinds.get("base", 0) + kinds.get("merge", 0) + kinds.get("run", 0) <= options.get("max_merges", 10**6) + (
        options.get("k_bases", 0)
    )
    if not options:
        assert tok.vocab_size == max(size, FIRST_LEARNED + 2)
    text = corpus()[:2000]
    assert tok.decode(tok.encode(text)) == text


def test_files_give_the_vocabulary_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text(corpus(), newline="")
    tok = HybridTokenizer(portable=True)
    tok.add_files(str(tmp_path / "*.txt"))
    tok.freeze_vocab(vocab_size=900)
    assert tok.fingerprint == make(portable=True).fingerprint


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(TokenizerError, match="phrases must be 0"):
        make(portable=True, phrases=0.1)
    with pytest.raises(TokenizerError, match="boundaries"):
        make(portable=True, boundaries="spaces")
    with pytest.raises(TokenizerError, match="portable is 'yes'"):
        HybridTokenizer(portable="yes")
    with pytest.raises(TokenizerError, match=r"portable=True"):
        make().save_tokenizer_json("tokenizer.json")
    assert HybridTokenizer(portable=True).lowercase is False


def test_names_and_special_tokens(portable):
    assert repr(portable) == "HybridTokenizer(portable=True, vocab_size=900)"
    assert set(portable.kinds[:FIRST_BYTE]) == {"special"}
    assert portable.token2id[" "] == FIRST_BYTE + 32
    assert portable.decode(range(FIRST_BYTE)) == ""
    assert portable.decode([7, 8], skip_special_tokens=False) == "<SP><NL>"
    for text in EDGE_CASES:
        assert all(id_ >= FIRST_BYTE for id_ in portable.encode(text))
    assert [portable.token_bytes[id_] for id_ in (0, 7, FIRST_BYTE + 0xE4)] == [b"", b"", b"\xe4"]


# The package `tokenizers`


def check(portable, theirs, text):
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ids == portable.encode(text)
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("text", [*LANGUAGES.values(), *EDGE_CASES, corpus()])
def test_ids_of_languages_and_edge_cases(portable, theirs, text):
    text = text.encode("utf-8", "replace").decode()
    check(portable, theirs, text)
    assert theirs.encode(text).ids == [5, *portable.encode(text)]


@settings(deadline=None)
@given(text=scalar_text)
def test_ids_of_any_text(portable, theirs, text):
    check(portable, theirs, text)


def random_texts(count: int, seed: int):
    """Yield strings of random words, white space and code points."""
    source = random.Random(seed)
    words = [*corpus().split(), " ", " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "'\u017f", "123", "...", "\u00a0"]
    for _ in range(count):
        parts = [
            chr(source.randrange(0xD800)) if source.random() < 0.3 else source.choice(words)
            for _ in range(source.randrange(1, 12))
        ]
        if source.random() < 0.3:
            parts.append(chr(source.randrange(0xE000, 0x110000)))
        yield "".join(parts)


def compare_random_texts(portable, theirs, count: int, seed: int = 1):
    texts = list(random_texts(count, seed))
    encoded = theirs.encode_batch(texts, add_special_tokens=False)
    own = portable.encode_arrays(texts)
    assert [ids.ids for ids in encoded] == [ids.tolist() for ids in own]
    assert theirs.decode_batch([ids.ids for ids in encoded]) == texts


def test_ids_of_random_texts(portable, theirs):
    compare_random_texts(portable, theirs, 10_000)


@pytest.mark.slow
def test_ids_of_a_million_random_texts(portable, theirs):
    for seed in range(50):
        compare_random_texts(portable, theirs, 20_000, seed + 2)


def test_characters_at_the_edges_of_the_tables(portable, theirs):
    """Every character whose class could differ by one, in contexts that show its class."""
    edges = set()
    for ranges in (character_tables.LETTERS, character_tables.NUMBERS, character_tables.WHITE_SPACE):
        for item in ranges.split():
            first, _, last = item.partition("-")
            edges.update((int(first, 16) - 1, int(first, 16), int(last or first, 16), int(last or first, 16) + 1))
    texts = [f"a{chr(code)}b {chr(code)}{chr(code)}1.{chr(code)}\n {chr(code)}" for code in sorted(edges)]
    encoded = theirs.encode_batch(texts, add_special_tokens=False)
    for text, ids in zip(texts, encoded, strict=True):
        pieces = theirs.pre_tokenizer.pre_tokenize_str(text)
        assert len(pieces) == len(split_pretokens(text)), text
        assert ids.ids == portable.encode(text)


def test_characters_on_which_engines_disagree(theirs):
    """The spelled-out pattern splits like ours where the engine's own character classes would not."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    plain = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PLAIN_PATTERN), "isolated")
    # A letter of Unicode 16.0, a digit of 16.0, and a letter that equals "s" where case is ignored.
    for text in ("a\u1c89", ".\U00010d40", "'\u017fo"):
        own = split_pretokens(text)
        assert len(theirs.pre_tokenizer.pre_tokenize_str(text)) == len(own)
        assert [piece for piece, _ in plain.pre_tokenize_str(text)] != own
    for text in (*LANGUAGES.values(), corpus()):
        assert [piece for piece, _ in plain.pre_tokenize_str(text)] == split_pretokens(text)


def test_a_saved_tokenizer_json_is_loaded(portable, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    portable.save_tokenizer_json(tmp_path / "tokenizer.json")
    loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    check(portable, loaded, LANGUAGES["english"])
    assert loaded.get_vocab_size() == portable.vocab_size
    assert loaded.token_to_id("<EOS>") == portable.token2id["<EOS>"]
