"""Learning: determinism, options, the contents of the vocabulary, and one-line errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_tokenizer.conftest import make
from tests.test_tokenizer.samples import corpus
from tokenizer import HybridTokenizer, TokenizerError
from tokenizer.portable.pretokens import split_pretokens
from tokenizer.vocabulary import RESERVED_NAMES, first_entry_id

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from tests.test_tokenizer.conftest import make
make(phrases=0.1, score=sys.argv[2]).save(sys.argv[1])
make(portable=True, score=sys.argv[2]).save(sys.argv[1] + ".portable")
"""


@pytest.mark.parametrize("score", ["freq", "freq_pmi"])
def test_saved_file_is_independent_of_the_hash_seed(tmp_path, score):
    files = []
    for seed in ("0", "1", "77"):
        path = tmp_path / f"{seed}.hybtok"
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", SCRIPT, str(path), score], check=True, cwd=ROOT, env=environment)
        files.append((path.read_bytes(), (tmp_path / f"{seed}.hybtok.portable").read_bytes()))
    make(phrases=0.1, score=score).save(tmp_path / "here.hybtok")
    make(portable=True, score=score).save(tmp_path / "portable.hybtok")
    assert {((tmp_path / "here.hybtok").read_bytes(), (tmp_path / "portable.hybtok").read_bytes())} == set(files)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("options", [{}, {"phrases": 0.2}, {"k_bases": 40}, {"score": "pmi"}, {"score": "freq_pmi"}])
@pytest.mark.parametrize("size", [first_entry_id(True, True), 300, 700])
def test_vocabulary_size_is_respected(lowercase, options, size):
    tok = make(lowercase=lowercase, vocab_size=size, **options)
    assert tok.vocab_size <= size
    if not options and lowercase:
        assert tok.vocab_size == size
    assert len(tok.token2id) == len(tok.id2token) == tok.vocab_size
    assert all(tok.token2id[name] == id_ for id_, name in tok.id2token.items())
    text = corpus()[:2000]
    assert tok.decode(tok.encode(text)) == text


def test_every_entry_is_made_of_earlier_ones_and_encodes_its_own_text(tok):
    vocabulary = tok._vocabulary
    for id_ in range(vocabulary.first_entry, tok.vocab_size):
        explanation = tok.explain_token(id_)
        assert explanation.data == vocabulary.data[id_]
        assert vocabulary.texts[id_] not in RESERVED_NAMES
        for part in explanation.parts:
            assert part.id is not None
            assert part.id < id_ or (explanation.kind == "base" and tok.portable)
        if id_ < vocabulary.first_phrase and not (tok.portable and split_pretokens(vocabulary.texts[id_])[1:]):
            assert not tok.portable or vocabulary.texts[id_] or vocabulary.data[id_]
            assert not vocabulary.texts[id_] or tok.encode(vocabulary.texts[id_]) == [id_]


def test_case_marks_share_one_entry():
    tok = make()
    up, caps = tok.token2id["<UP>"], tok.token2id["<CAPS>"]
    the = tok.token2id[" the"]
    assert tok.encode(" the") == [the]
    words = [
        name for name in tok.token2id if name.isascii() and name[0] == " " and name[1:].isalpha() and name.islower()
    ]
    rare = max(words, key=len)
    assert tok.encode(rare.upper()) == [caps, tok.token2id[rare]]
    assert tok.decode([up, tok.token2id[rare]]) == " " + rare.strip().capitalize()


def test_cased_vocabulary_has_no_case_marks():
    tok = make(lowercase=False)
    assert "<UP>" not in tok.token2id
    assert "case" not in tok.db_status().kinds


def test_phrases_respect_the_boundaries():
    """The right part of a phrase starts with white space unless boundaries are at spaces only."""
    starts_with_white_space = {}
    for boundaries in ("words", "spaces"):
        vocabulary = make(vocab_size=1200, phrases=0.3, boundaries=boundaries)._vocabulary
        rights = [vocabulary.texts[right] for _, right in vocabulary.phrases]
        starts_with_white_space[boundaries] = {text[0] in " \n" for text in rights}
    assert starts_with_white_space == {"words": {True}, "spaces": {True, False}}


def test_phrases_span_words_and_shorten_text():
    plain, phrased = make(vocab_size=1200), make(vocab_size=1200, phrases=0.1)
    vocabulary = phrased._vocabulary
    assert 0 < len(vocabulary.phrases) <= 0.1 * 1200
    for id_ in range(vocabulary.first_phrase, vocabulary.size):
        assert vocabulary.kind(id_) == "phrase"
    common = "the of and to in a is that it was for on are with as his they at be this"
    text = (common + " ") * 50
    tok = HybridTokenizer()
    tok.add_text(text)
    tok.freeze_vocab(vocab_size=400, phrases=0.2)
    assert tok.count(text) < 50 * len(common.split())
    assert plain.vocab_size == 1200


def test_bases_are_the_most_common_short_words():
    tok = HybridTokenizer(byte_limit=3)
    tok.add_text("of the of the of the house of gold " * 20)
    tok.freeze_vocab(k_bases=2, max_merges=50)
    kinds = {segment.text: segment.kind for segment in tok.segment("x of the house")}
    assert kinds[" of"] == kinds[" the"] == "base"
    assert kinds[" house"] == "merge"
    assert tok.db_status().kinds["base"] == 2


def test_counts_and_ranks_are_reported():
    tok = make()
    merges = tok.top_merges(5)
    assert [merge.rank for merge in merges] == list(range(5))
    spell = {"<SP>": " ", "<NL>": "\n"}
    for merge in merges:
        assert merge.text == spell.get(merge.left, merge.left) + spell.get(merge.right, merge.right)
    assert [merge.count for merge in merges] == sorted((merge.count for merge in tok.top_merges(10**6)), reverse=True)[
        :5
    ]
    assert len(repr(merges).split("\n")) == 7
    status = tok.db_status(preview=3)
    assert status.frozen
    assert sum(status.kinds.values()) == status.vocab_size == tok.vocab_size
    assert len(status.preview) == 3
    assert "frozen" in repr(status)
    counting = HybridTokenizer()
    counting.add_text("a b a")
    assert counting.db_status().keys == 3
    assert not counting.db_status().frozen


def test_errors_are_one_line_with_the_reason(tmp_path):
    tok = HybridTokenizer()
    for call in (lambda: tok.encode("a"), lambda: tok.vocab_size, lambda: tok.decode([1]), lambda: tok.save("x")):
        with pytest.raises(TokenizerError, match="no vocabulary yet"):
            call()
    with pytest.raises(TokenizerError, match="nothing was counted"):
        tok.freeze_vocab()
    tok.add_text("")
    with pytest.raises(TokenizerError, match="nothing was counted"):
        tok.freeze_vocab()
    tok.add_text("some text, some text")
    wrong = [
        ({"vocab_size": 100}, "at least 271"),
        ({"vocab_size": 10**9}, "at most"),
        ({"vocab_size": "8k"}, "must be an integer"),
        ({"vocab_size": True}, "must be an integer"),
        ({"k_bases": -1}, "at least 0"),
        ({"max_merges": 1.5}, "must be an integer"),
        ({"min_freq": 0}, "at least 1"),
        ({"score": "best"}, "one of freq"),
        ({"phrases": 0.9}, "from 0 to 0.5"),
        ({"phrases": True}, "from 0 to 0.5"),
    ]
    for options, message in wrong:
        with pytest.raises(TokenizerError, match=message):
            tok.freeze_vocab(**options)
    tok.freeze_vocab()
    for call in (tok.freeze_vocab, lambda: tok.add_text("more"), lambda: tok.add_file("x")):
        with pytest.raises(TokenizerError, match="frozen"):
            call()
    for ids in ([tok.vocab_size], [-1], [0, 10**12], ["a"], [1.5], 7, [[1, 2, 3]], [(1, -(10**12))], None):
        with pytest.raises(TokenizerError):
            tok.decode(ids)
    for call in (
        lambda: tok.encode(b"bytes"),
        lambda: tok.encode("a", mode="list"),
        lambda: tok.encode_batch("one text"),
        lambda: tok.encode_batch(["a"], max_len=0),
        lambda: tok.explain_token(10**6),
        lambda: HybridTokenizer(byte_limit=0),
        lambda: HybridTokenizer(lowercase="yes"),
        lambda: HybridTokenizer.pretrained("klingon-8k"),
        lambda: HybridTokenizer().add_file(tmp_path / "missing.txt"),
        lambda: HybridTokenizer().add_files(f"{tmp_path}/**/*.txt"),
        lambda: HybridTokenizer().add_text(None),
    ):
        with pytest.raises(TokenizerError) as caught:
            call()
        assert "\n" not in str(caught.value)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(TokenizerError, match=r"not UTF-8 text \(byte 3\)"):
        HybridTokenizer().add_file(tmp_path / "latin.txt")
