"""Turn tokens: special tokens of conversations in new vocabularies, reserved ones in those of earlier versions."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_tokenizer.samples import LANGUAGES
from tokenizer import HybridTokenizer, TokenizerError, pretrained_names
from tokenizer.storage import check_consistency
from tokenizer.vocabularies import path_of
from tokenizer.vocabulary import SPECIAL_TOKENS, TURN_TOKENS

TEXT = "The <|user|> asked; the <|end|> came. THE END of <|assistant|> and <|system|>, the\n\tend.\n" * 40
KINDS = {"hybrid": {}, "cased": {"lowercase": False}, "portable": {"portable": True}}


def learn(kind: str, size: int, **options) -> HybridTokenizer:
    tokenizer = HybridTokenizer(**KINDS[kind])
    tokenizer.add_text(TEXT + "".join(LANGUAGES.values()))
    tokenizer.freeze_vocab(vocab_size=size, **options)
    return tokenizer


@pytest.fixture(scope="module", params=KINDS)
def pair(request) -> tuple[HybridTokenizer, HybridTokenizer]:
    """A tokenizer with turn tokens, and one with as many learned entries without them."""
    return learn(request.param, 404), learn(request.param, 400, turn_tokens=False)


def test_learned_entries_are_the_same_with_and_without_turn_tokens(pair):
    tokenizer, without = pair
    first = tokenizer.vocabulary.first_entry
    assert first == without.vocabulary.first_entry + 4
    assert tokenizer.token_bytes[first:] == without.token_bytes[first - 4 :]
    assert tokenizer.vocabulary.counts == without.vocabulary.counts
    ids = np.array(without.encode(TEXT))
    assert tokenizer.encode(TEXT) == np.where(ids < first - 4, ids, ids + 4).tolist()


def test_turn_tokens_are_special(pair):
    tokenizer, without = pair
    ids = list(tokenizer.turn_ids)
    assert [tokenizer.id2token[id_] for id_ in ids] == list(TURN_TOKENS)
    assert {tokenizer.kinds[id_] for id_ in ids} == {"special"}
    assert set(ids) <= set(tokenizer.suppressed_ids)
    assert tokenizer.decode([*ids, *tokenizer.encode(TEXT)]) == TEXT
    assert tokenizer.decode(np.array([*ids] * 500)) == ""
    assert tokenizer.decode(ids, skip_special_tokens=False) == "".join(TURN_TOKENS)
    assert tokenizer.decode(np.array(ids * 500), skip_special_tokens=False) == "".join(TURN_TOKENS) * 500
    assert tokenizer.explain_token("<|user|>").kind == "special"
    assert "<|end|>" in repr(tokenizer.db_status(0))
    assert "<|end|>" not in repr(without.db_status(0))
    stream = tokenizer.stream_decoder()
    assert "".join(map(stream.push, [ids[1], *tokenizer.encode("Hi"), ids[3]])) + stream.finish() == "Hi"


def test_vocabularies_without_turn_tokens_use_reserved_ones(pair):
    names = [SPECIAL_TOKENS[id_] for id_ in pair[1].turn_ids]
    assert names == ["<CLS>", "<SEP>", "<MASK>", "<RES>"]


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from([*TURN_TOKENS, "<EOS>", "|>", "<|", "\ud800"]), st.text(max_size=5))))
def test_no_text_produces_a_turn_token(pair, parts):
    text = "".join(parts)
    for tokenizer in pair:
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.vocabulary.special_ids)
        assert tokenizer.decode(ids) == text


def test_files_have_version_3_with_turn_tokens_only(pair, tmp_path):
    path = tmp_path / "a.hybtok"
    for tokenizer, version in zip(pair, (3, 2 if pair[0].portable else 1), strict=True):
        tokenizer.save(path)
        assert struct.unpack_from("<H", path.read_bytes(), 8) == (version,)
        loaded = HybridTokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.turn_ids == tokenizer.turn_ids
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert pair[0].fingerprint != pair[1].fingerprint


@pytest.mark.parametrize(("stated", "index"), [(1, 0), (2, 0), (3, 1)])
def test_a_file_whose_version_does_not_match_its_content_is_refused(pair, tmp_path, stated, index):
    path = tmp_path / "a.hybtok"
    pair[index].save(path)
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack("<H", stated) + data[10:])
    with pytest.raises(TokenizerError, match="version is that of another kind"):
        HybridTokenizer.load(path)


@pytest.mark.parametrize("name", pretrained_names())
def test_files_of_earlier_versions_keep_their_bytes(name, tmp_path):
    HybridTokenizer.load(path_of(name)).save(tmp_path / "again.hybtok")
    assert (tmp_path / "again.hybtok").read_bytes() == path_of(name).read_bytes()


def test_no_entry_is_made_of_a_turn_token(pair):
    vocabulary = pair[0].vocabulary
    turn = vocabulary.turn_ids.user
    for merge in ((turn, vocabulary.first_entry - 4 - 200), (vocabulary.first_entry - 4 - 200, turn)):
        damaged = replace(vocabulary, merges=(merge, *vocabulary.merges[1:]))
        with pytest.raises(TokenizerError, match="is made of"):
            check_consistency(damaged)
