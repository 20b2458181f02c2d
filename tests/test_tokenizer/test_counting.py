"""Counting: the same whatever the cut, the order of work and the number of processes, in bounded memory."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_tokenizer.samples import any_text, corpus
from tokenizer import HybridTokenizer
from tokenizer.encoding.encoder import blocks
from tokenizer.learning import counting
from tokenizer.learning.counting import KeyCounts, shards_of
from tokenizer.units import iterate_keys


@given(text=any_text)
def test_counts_are_the_keys(text):
    counts = KeyCounts()
    counts.add_text(text)
    assert counts.keys == Counter(iterate_keys(text))


@given(text=any_text, size=st.integers(1, 20))
def test_blocks_cut_between_keys(text, size):
    cut = list(blocks(text, size, last=64))
    assert "".join(cut) == text
    assert [key for block in cut for key in iterate_keys(block)] == list(iterate_keys(text))


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "SHARD_BYTES", 10_000)
    text = corpus()
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(("中" * 30_000 + "\r\n" + text[::-1]).encode())
    (tmp_path / "empty.txt").write_bytes(b"")
    return tmp_path


def test_shards_are_the_file(files):
    for path in files.iterdir():
        data = path.read_bytes()
        shards = list(shards_of(str(path)))
        assert b"".join(data[start:stop] for _, start, stop in shards) == data
        assert all(stop - start < 80_000 for _, start, stop in shards)
        for _, start, stop in shards:
            data[start:stop].decode()


def test_processes_do_not_matter(tmp_path):
    # Real shards, since other processes do not see a patched size: several small files.
    for index in range(5):
        (tmp_path / f"{index}.txt").write_text(corpus()[index * 3000 :], encoding="utf-8", newline="")
    saved = []
    for processes in (1, 2):
        tok = HybridTokenizer()
        found = tok.add_files(f"{tmp_path}/*.txt", processes=processes)
        assert len(found) == 5
        tok.freeze_vocab(vocab_size=600, phrases=0.1)
        tok.save(tmp_path / f"{processes}.hybtok")
        saved.append((tmp_path / f"{processes}.hybtok").read_bytes())
    assert saved[0] == saved[1]


def test_shards_count_like_the_text(files):
    tok = HybridTokenizer()
    tok.add_file(files / "a.txt")
    whole = HybridTokenizer()
    whole.add_text(corpus())
    assert tok._counts.keys == whole._counts.keys


def test_memory_is_bounded_and_common_keys_stay():
    counts = KeyCounts(limit=1000, sample_limit=50_000)
    for index in range(200):
        counts.add_text("the common words " * 5 + " ".join(f"rare{index}x{n}" for n in range(100)) + " ")
        assert len(counts.keys) <= 1000
        assert sum(len(text) for _, text in counts.sample) <= 50_000
    assert counts.undercount >= 1
    assert 1000 - counts.undercount <= counts.keys[" common"] <= 1000


def test_counts_are_too_low_by_no_more_than_they_say():
    """Words that come and go, each hundreds of times within its part of the stream."""
    source, truth, counts = random.Random(3), Counter(), KeyCounts(limit=300)
    for index in range(300):
        words = source.choices(range(index * 5, index * 5 + 100), k=150)
        text = "".join(f" w{word}" for word in [*words, *range(10**6 + index * 50, 10**6 + index * 50 + 50)])
        shard = KeyCounts(limit=100)
        shard.add_text(text)
        truth.update(iterate_keys(text))
        counts.merge(shard)
    assert 0 < counts.undercount < 2000
    assert len(counts.keys) <= 300
    assert all(truth[key] - counts.undercount <= counts.keys[key] <= truth[key] for key in truth)
    assert any(counts.keys[key] < truth[key] for key in counts.keys)


def test_a_long_text_is_counted_in_stretches(monkeypatch):
    monkeypatch.setattr(counting, "STRETCH", 500)
    counts = KeyCounts()
    counts.add_text(corpus())
    assert counts.keys == Counter(iterate_keys(corpus()))


def test_sample_does_not_depend_on_the_order():
    texts = [f"text {index} " * 40 for index in range(50)]
    forward, backward = KeyCounts(sample_limit=4000), KeyCounts(sample_limit=4000)
    for text in texts:
        forward.add_text(text)
    for text in reversed(texts):
        backward.add_text(text)
    assert sorted(forward.sample) == sorted(backward.sample)
