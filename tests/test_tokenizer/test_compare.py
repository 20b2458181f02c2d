"""The comparison with other tokenizers, which are optional dependencies."""

import logging

import pytest

from tests.test_tokenizer.samples import LANGUAGES, corpus
from tokenizer import TokenizerError
from tokenizer.inspect.compare import compare, format_table, hold_out


def test_hold_out_is_a_partition():
    texts = [corpus() * 20]
    learn, held_out = hold_out(texts)
    assert learn
    assert held_out
    assert sum(map(len, learn + held_out)) == len(texts[0])
    assert hold_out(texts) == (learn, held_out)
    for size in (2, 50, 3000):
        assert all(hold_out(["".join(map(chr, range(64, 64 + size)))]))


def test_baselines_are_measured(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("tokenizer.inspect.compare._MIN_TIMED_BYTES", 10_000)
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    path = tmp_path / "text.txt"
    path.write_text(corpus() * 20, encoding="utf-8", newline="")
    rows = compare([str(path)], 700, ["english-8k"])
    names = [row.name for row in rows]
    assert names[:2] == ["HybridTokenizer", "HybridTokenizer english-8k"]
    assert {"Hugging Face BPE", "tiktoken"} <= set(names)
    assert all(row.bytes_per_token > 1 and row.encode_first > 0 and row.decode > 0 for row in rows)
    density = {row.name: row.bytes_per_token for row in rows}
    assert density["tiktoken"] == pytest.approx(density["Hugging Face BPE"], rel=0.02)  # the same merges
    assert len(format_table(rows).split("\n")) == len(rows) + 1
    assert "700" in caplog.messages[0]


def test_tiktoken_has_the_same_merges():
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    from tokenizer.inspect import baselines

    model = baselines.train_hugging_face([corpus()], 600)
    hugging_face, tiktoken = baselines.hugging_face(model), baselines.tiktoken_from(model)
    for text in LANGUAGES.values():
        assert tiktoken.decode(list(tiktoken.encode(text))) == text
        assert abs(len(tiktoken.encode(text)) - len(hugging_face.encode(text))) <= 2


def test_too_little_text(tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text("tiny", encoding="utf-8")
    with pytest.raises(TokenizerError, match="too little text"):
        compare([str(path)], 700, [])


def test_speed_is_left_out_for_little_text(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "small.txt"
    path.write_text(corpus()[:3000], encoding="utf-8", newline="")
    rows = compare([str(path)], 400, ["english-8k"])
    assert any("too little text to measure speed" in line for line in caplog.messages)
    assert all(row.bytes_per_token > 0.5 and row.decode is None for row in rows)
    assert "MB/s" not in format_table(rows)
