"""Pickles of my_slm: word counts are imported, nothing is executed."""

import gzip
import pickle
from collections import Counter

import pytest

from tokenizer import HybridTokenizer, TokenizerError


class Malicious:
    """Creates a file when it is unpickled without restrictions."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def _write(path, state):
    path.write_bytes(gzip.compress(pickle.dumps(state, protocol=pickle.HIGHEST_PROTOCOL)))
    return path


def test_word_counts_are_imported(tmp_path):
    state = {
        "special_tokens": ["<PAD>"],
        "lowercase": True,
        "byte_limit": 3,
        "word_db": Counter({"the": 50, "welcome": 20, "שלום": 9}),
        "token2id": {"<PAD>": 0, "the": 1},
        "merge_rules": {"welcome": ("wel", "come")},
        "frozen": True,
    }
    tok = HybridTokenizer.import_pickle(_write(tmp_path / "tokenizer_state.pkl.gz", state))
    assert not tok.is_frozen
    assert tok.byte_limit == 3
    tok.freeze_vocab()
    assert tok.segment(" the")[0][:2] == (" the", "base")
    assert len(tok.encode(" welcome שלום")) == 2


def test_nothing_is_executed(tmp_path):
    trace = tmp_path / "trace"
    for state in (Malicious(trace), {"word_db": Counter(a=1), "x": Malicious(trace)}, {"word_db": Malicious(trace)}):
        with pytest.raises(TokenizerError):
            HybridTokenizer.import_pickle(_write(tmp_path / "malicious.pkl.gz", state))
    assert not trace.exists()


@pytest.mark.parametrize("state", [None, [], {}, {"word_db": {}}, {"word_db": {1: 2}}, {"word_db": {"a": -1}}, 7])
def test_other_pickles_are_rejected(tmp_path, state):
    with pytest.raises(TokenizerError):
        HybridTokenizer.import_pickle(_write(tmp_path / "other.pkl.gz", state))


def test_files_that_are_no_pickles_are_rejected(tmp_path):
    for data in (b"", b"\x1f\x8b", b"hello", gzip.compress(b"hello")[:-4]):
        path = tmp_path / "none.pkl.gz"
        path.write_bytes(data)
        with pytest.raises(TokenizerError):
            HybridTokenizer.import_pickle(path)
