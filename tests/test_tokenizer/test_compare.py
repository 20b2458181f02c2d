"""The comparison with other tokenizers; needs those to be installed (they are optional)."""

import pytest

from tests.test_tokenizer.samples import LANGUAGES, corpus
from tokenizer import TokenizerError
from tokenizer.inspect.compare import compare, hold_out, table


def test_hold_out_is_a_partition():
    texts = [corpus() * 20]
    learn, measured = hold_out(texts)
    assert learn
    assert measured
    assert sum(map(len, learn + measured)) == len(texts[0])
    assert hold_out(texts) == (learn, measured)
    for size in (2, 50, 3000):
        assert all(hold_out(["".join(map(chr, range(64, 64 + size)))]))


def test_rivals_are_measured_and_lossless(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenizer.inspect.compare._TIMED", 10_000)
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    path = tmp_path / "text.txt"
    path.write_text(corpus() * 20, encoding="utf-8", newline="")
    said: list[str] = []
    rows = compare([str(path)], 700, ["english-8k"], said.append)
    names = [row.name for row in rows]
    assert names[:2] == ["HybridTokenizer", "HybridTokenizer english-8k"]
    assert {"Hugging Face BPE", "tiktoken"} <= set(names)
    assert all(row.bytes_per_token > 1 and row.encode_first > 0 and row.decode > 0 for row in rows)
    of = {row.name: row.bytes_per_token for row in rows}
    assert of["tiktoken"] == pytest.approx(of["Hugging Face BPE"], rel=0.02)  # the same merges
    assert len(table(rows).split("\n")) == len(rows) + 1
    assert "700" in said[0]


def test_tiktoken_has_the_same_merges():
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    from tokenizer.inspect import rivals

    model = rivals.train_hugging_face([corpus()], 600)
    hugging_face, tiktoken = rivals.hugging_face(model), rivals.tiktoken_of(model)
    for text in LANGUAGES.values():
        assert tiktoken.decode(list(tiktoken.encode(text))) == text
        assert abs(len(tiktoken.encode(text)) - len(hugging_face.encode(text))) <= 2


def test_too_little_text(tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text("tiny", encoding="utf-8")
    with pytest.raises(TokenizerError, match="too little text"):
        compare([str(path)], 700, [], print)


def test_of_little_text_only_the_bytes_per_token_are_told(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text(corpus()[:3000], encoding="utf-8", newline="")
    said: list[str] = []
    rows = compare([str(path)], 400, ["english-8k"], said.append)
    assert any("too little text to measure speed" in line for line in said)
    assert all(row.bytes_per_token > 0.5 and row.decode is None for row in rows)
    assert "MB/s" not in table(rows)
