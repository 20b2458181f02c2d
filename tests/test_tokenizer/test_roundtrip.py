"""Decoding inverts encoding for every str, and every fast path gives the ids of the reference encoder."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_tokenizer.conftest import encode_reference
from tests.test_tokenizer.samples import EDGE_CASES, LANGUAGES, any_text, corpus
from tokenizer import HybridTokenizer, TokenizerError
from tokenizer.encoding import base_encoder
from tokenizer.encoding.pretokenization import MAX_PRETOKEN, PRETOKEN, split_long_pretoken
from tokenizer.vocabulary import NL, SP


def check(tok: HybridTokenizer, text: str) -> None:
    """Check the round trip in every format, the ids against the reference, offsets and streaming."""
    ids = tok.encode(text)
    assert ids == encode_reference(text, tok._vocabulary)
    encoder = tok._encoder
    assert encoder._bulk.ids_of_many([text, "", text]) == [encoder.ids(text), b"", encoder.ids(text)]
    assert tok.decode(ids) == text
    assert tok.decode(tok.encode(text, mode="rle")) == text
    array = tok.encode_array(text)
    assert array.tolist() == ids
    assert tok.decode(array) == text
    assert all(id_ >= SP for id_ in ids)
    assert tok.count(text) == len(ids)
    decoder = tok.stream_decoder()
    assert "".join([*(decoder.push(id_) for id_ in ids), decoder.finish()]) == text
    spans = tok.offsets(text)
    assert len(spans) == len(ids)
    covered = 0
    for start, end in spans:
        assert start <= covered <= end
        covered = max(covered, end)
    assert covered == len(text)


@pytest.mark.parametrize("text", [*LANGUAGES.values(), *EDGE_CASES])
def test_languages_and_edge_cases(tok, text):
    check(tok, text)


def test_corpus(tok):
    check(tok, corpus())


@settings(deadline=None)
@given(text=any_text)
def test_any_text(tok, text):
    check(tok, text)


@pytest.mark.slow
@settings(deadline=None, max_examples=max(5_000, settings().max_examples))
@given(text=any_text)
def test_any_text_exhaustively(tok, text):
    """Thousands of examples for each of the five tokenizers; 100,000 in total with `--hypothesis-profile long`."""
    check(tok, text)


@settings(deadline=None)
@given(text=any_text)
def test_single_edge_equals_the_table_of_edges(tok, text):
    vocabulary = tok._vocabulary
    if vocabulary.portable:
        return  # it has no edges
    for start in range(len(text)):
        for end in range(start + 1, min(len(text), start + 12) + 1):
            piece = text[start:end]
            for form in (piece, piece.upper(), piece.capitalize()):
                assert vocabulary.edge(form) == vocabulary.edges.get(form)


def test_every_edge_can_be_looked_up_alone(tok):
    vocabulary = tok._vocabulary
    if vocabulary.portable:
        pytest.skip("it has no edges")
    assert all(vocabulary.edge(text) == ids for text, ids in vocabulary.edges.items())


@pytest.mark.parametrize("text", [*LANGUAGES.values(), *EDGE_CASES])
def test_first_text_after_loading(tok, text):
    """Encode before any table is built."""
    assert HybridTokenizer.from_vocabulary(tok._vocabulary).encode(text) == encode_reference(text, tok._vocabulary)


def test_tables_are_built_when_they_pay(tok):
    """Long texts get the same ids before the tables are built, as the tables are, and after."""
    vocabulary = tok._vocabulary
    fresh = HybridTokenizer.from_vocabulary(vocabulary)
    text = corpus()[: base_encoder.MIN_BULK]
    halves = [text[:2000], text[2000:]]
    expected = encode_reference(text, vocabulary)
    expected_of_halves = [encode_reference(half, vocabulary) for half in halves]
    for number in range(1, base_encoder.MIN_FIRST_BULK // base_encoder.MIN_BULK + 2):
        if number % 2:
            assert fresh.encode(text) == expected
        else:
            assert [ids.tolist() for ids in fresh.encode_arrays(halves)] == expected_of_halves
        assert ("_bulk" in vars(fresh._encoder)) == (number * base_encoder.MIN_BULK >= base_encoder.MIN_FIRST_BULK)


@pytest.mark.parametrize("wrong", [-1, -(2**31), 2**31, 2**32 - 1, 10**6])
@pytest.mark.parametrize("count", [3, 1000])
def test_invalid_ids_are_rejected(tok, wrong, count):
    for ids in ([9] * count + [wrong], [wrong] + [9] * count, np.array([9] * count + [wrong])):
        with pytest.raises(TokenizerError, match=f"^{wrong} is not an id|decode takes ids"):
            tok.decode(ids)


@settings(deadline=None)
@given(texts=st.lists(any_text, max_size=5))
def test_batch_equals_single(tok, texts):
    rows, mask = tok.encode_batch(texts)
    for text, row, kept in zip(texts, rows, mask, strict=True):
        assert row[kept].tolist() == tok.encode(text)
        assert not row[~kept].any()
    assert [ids.tolist() for ids in tok.encode_arrays(texts)] == [tok.encode(text) for text in texts]
    rows, mask = tok.encode_batch(texts, max_len=3)
    assert rows.shape == mask.shape == (len(texts), 3)
    for text, row, kept in zip(texts, rows, mask, strict=True):
        assert row[kept].tolist() == tok.encode(text)[:3]


@given(text=any_text)
def test_pretokens_concatenate_to_the_text(text):
    pretokens = PRETOKEN.findall(text)
    assert "".join(pretokens) == text
    for pretoken in pretokens:
        parts = split_long_pretoken(pretoken)
        assert "".join(parts) == pretoken
        assert all(0 < len(part) <= MAX_PRETOKEN for part in parts)


@settings(deadline=None)
@given(data=st.data())
def test_streaming_equals_decoding_for_any_ids(tok, data):
    """Ids that no text encodes to, as a model generates them."""
    ids = data.draw(st.lists(st.one_of(st.integers(0, tok.vocab_size - 1), st.integers(0, 270)), max_size=40))
    ids = [id_ for id_ in ids if id_ < tok.vocab_size]
    whole = tok.decode(ids)
    decoder = tok.stream_decoder()
    assert "".join([*(decoder.push(id_) for id_ in ids), decoder.finish()]) == whole
    assert whole == tok._decoder.to_text(ids)


def test_text_never_encodes_to_special_tokens(tok):
    for name in ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK>", "<EOS>", "<RES>"):
        id_ = tok.token2id[name]
        assert id_ not in tok.encode(f"a {name} {name}")
        assert tok.decode([id_]) == ""
        assert tok.decode([id_], skip_special_tokens=False) == name
    assert [tok.token2id[name] for name in ("<PAD>", "<SP>", "<NL>")] == [0, SP, NL]
    assert tok.token2id["<EOS>"] == 5


@settings(deadline=None)
@given(data=st.data())
def test_arrays_decode_like_lists(tok, data):
    """Compare the NumPy decoder with the plain one for any ids, short and long."""
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1), max_size=30)) * data.draw(st.integers(1, 20))
    plain = tok._decoder.to_bytes(ids)
    assert bytes(tok._decoder._batch.decode(np.array(ids, dtype=np.int32))) == plain
    assert tok.decode(ids) == tok.decode(np.array(ids, dtype=np.uint16)) == tok._decoder.to_text(ids)


@settings(deadline=None)
@given(left=any_text, right=any_text)
def test_encoding_is_additive_between_pretokens(tok, left, right):
    """encode(a) + encode(b) == encode(a + b) if b starts with white space and a does not end with it."""
    if tok._vocabulary.phrases:
        return
    left, right = left.rstrip() if tok.portable else left.rstrip(" \n"), " " + right.lstrip(" \n")
    assert tok.encode(left) + tok.encode(right) == tok.encode(left + right)
