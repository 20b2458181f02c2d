"""Old pickles: their counts come over, nothing in them runs."""

import gzip
import pickle
from collections import Counter

import pytest

from tokenizer import HybridTokenizer, TokenizerError


class Evil:
    """Leaves a file behind when it is unpickled carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def _write(path, state):
    path.write_bytes(gzip.compress(pickle.dumps(state, protocol=pickle.HIGHEST_PROTOCOL)))
    return path


def test_word_counts_come_over(tmp_path):
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


def test_nothing_runs(tmp_path):
    trace = tmp_path / "trace"
    for state in (Evil(trace), {"word_db": Counter(a=1), "x": Evil(trace)}, {"word_db": Evil(trace)}):
        with pytest.raises(TokenizerError):
            HybridTokenizer.import_pickle(_write(tmp_path / "evil.pkl.gz", state))
    assert not trace.exists()


@pytest.mark.parametrize("state", [None, [], {}, {"word_db": {}}, {"word_db": {1: 2}}, {"word_db": {"a": -1}}, 7])
def test_other_pickles_are_refused(tmp_path, state):
    with pytest.raises(TokenizerError):
        HybridTokenizer.import_pickle(_write(tmp_path / "other.pkl.gz", state))


def test_no_pickle_at_all(tmp_path):
    for data in (b"", b"\x1f\x8b", b"hello", gzip.compress(b"hello")[:-4]):
        path = tmp_path / "none.pkl.gz"
        path.write_bytes(data)
        with pytest.raises(TokenizerError):
            HybridTokenizer.import_pickle(path)
