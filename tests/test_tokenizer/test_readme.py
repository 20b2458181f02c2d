"""The examples of the original project (my_slm), unchanged except for the import."""

from itertools import pairwise

import numpy as np
import pytest

from tokenizer import HybridTokenizer


def test_quickstart():
    tok = HybridTokenizer()
    tok.add_text("Hello world, welcome to tokenization.")
    tok.freeze_vocab(k_bases=5000, max_merges=10000)
    tok.db_status(preview=10)
    s = "Hello, world!\nשלום  🙂"
    enc_rle = tok.encode(s, mode="rle")
    enc_flat = tok.encode(s, mode="flat")
    assert all(isinstance(pair, tuple) and len(pair) == 2 for pair in enc_rle)
    assert all(type(id_) is int for id_ in enc_flat)
    assert tok.decode(enc_rle) == s
    assert tok.decode(enc_flat) == s
    tok.top_merges(10)
    parts = tok.explain_token("welcome")
    seg = tok.segment("Hello שלום")
    assert parts.data == b"welcome"
    assert "".join(parts.leaves()) == "welcome"
    assert {kind for _, kind, _ in seg} <= {"base", "merge", "byte", "sp", "nl", "case", "char", "run"}
    assert "welcome" in repr(parts)
    assert "sp" in repr(seg)


def test_batch_for_training(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_text("the cat and the dog " * 50, encoding="utf-8")
    (tmp_path / "data" / "deep" / "b.txt").write_text("the bird and the fish " * 50, encoding="utf-8")
    tok = HybridTokenizer()
    tok.add_files(f"{tmp_path}/data/**/*.txt")
    tok.freeze_vocab(k_bases=5000, max_merges=10000)
    pad_id = tok.token2id["<PAD>"]
    ids, mask = tok.encode_batch(["the cat", "the bird and the dog"], max_len=8)
    assert pad_id == 0
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert (ids.shape, mask.shape) == ((2, 8), (2, 8))
    assert ((ids != pad_id) == mask).all()
    assert ids.max() < tok.vocab_size
    assert tok.decode(ids[1][mask[1]]) == "the bird and the dog"


@pytest.mark.parametrize(("text", "runs"), [("a" * 3, None), ("\n" * 3 + "!!!!", None)])
def test_run_lengths_are_maximal(text, runs):
    tok = HybridTokenizer()
    tok.add_text("x")
    tok.freeze_vocab(min_freq=1)
    pairs = tok.encode(text, mode="rle")
    assert all(left != right for (left, _), (right, _) in pairwise(pairs))
    assert sum(count for _, count in pairs) == tok.count(text)
