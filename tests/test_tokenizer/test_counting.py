"""Counting: independent of shard boundaries, order of work and number of processes, in bounded memory."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_tokenizer.samples import any_text, corpus
from tokenizer import HybridTokenizer
from tokenizer.encoding.pretokenization import iterate_pretokens, split_blocks
from tokenizer.learning import counting
from tokenizer.learning.counting import PretokenCounts, split_file


@given(text=any_text)
def test_counts_equal_those_of_the_reference(text):
    counts = PretokenCounts()
    counts.add_text(text)
    assert counts.pretokens == Counter(iterate_pretokens(text))


@given(text=any_text, size=st.integers(1, 20))
def test_blocks_end_between_pretokens(text, size):
    blocks = list(split_blocks(text, size))
    assert "".join(blocks) == text
    pretokens = [pretoken for block in blocks for pretoken in iterate_pretokens(block)]
    assert pretokens == list(iterate_pretokens(text))


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "SHARD_BYTES", 10_000)
    text = corpus()
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(("中" * 30_000 + "\r\n" + text[::-1]).encode())
    (tmp_path / "empty.txt").write_bytes(b"")
    return tmp_path


def test_shards_cover_the_file_and_end_between_characters(files):
    for path in files.iterdir():
        data = path.read_bytes()
        shards = list(split_file(str(path)))
        assert b"".join(data[start:stop] for _, start, stop in shards) == data
        assert all(stop - start < 80_000 for _, start, stop in shards)
        for _, start, stop in shards:
            data[start:stop].decode()


def test_result_is_independent_of_the_number_of_processes(tmp_path):
    # Several small files, because other processes would not see a patched shard size.
    for index in range(5):
        (tmp_path / f"{index}.txt").write_text(corpus()[index * 3000 :], encoding="utf-8", newline="")
    saved = []
    for processes in (1, 2):
        tok = HybridTokenizer()
        paths = tok.add_files(f"{tmp_path}/*.txt", processes=processes)
        assert len(paths) == 5
        tok.freeze_vocab(vocab_size=600, phrases=0.1)
        tok.save(tmp_path / f"{processes}.hybtok")
        saved.append((tmp_path / f"{processes}.hybtok").read_bytes())
    assert saved[0] == saved[1]


def test_counts_of_shards_add_up_to_those_of_the_text(files):
    tok = HybridTokenizer()
    tok.add_file(files / "a.txt")
    whole = HybridTokenizer()
    whole.add_text(corpus())
    assert tok._counts.pretokens == whole._counts.pretokens


def test_memory_is_bounded_and_common_pretokens_are_kept():
    counts = PretokenCounts(limit=1000, sample_limit=50_000)
    for index in range(200):
        counts.add_text("the common words " * 5 + " ".join(f"rare{index}x{n}" for n in range(100)) + " ")
        assert len(counts.pretokens) <= 1000
        assert sum(len(text) for _, text in counts.sample) <= 50_000
    assert counts.undercount >= 1
    assert 1000 - counts.undercount <= counts.pretokens[" common"] <= 1000


def test_counts_are_too_low_by_at_most_the_undercount():
    """Words appear and disappear, each hundreds of times within its part of the stream."""
    source = random.Random(3)
    truth = Counter()
    counts = PretokenCounts(limit=300)
    for index in range(300):
        words = source.choices(range(index * 5, index * 5 + 100), k=150)
        text = "".join(f" w{word}" for word in [*words, *range(10**6 + index * 50, 10**6 + index * 50 + 50)])
        shard = PretokenCounts(limit=100)
        shard.add_text(text)
        truth.update(iterate_pretokens(text))
        counts.merge(shard)
    assert 0 < counts.undercount < 2000
    assert len(counts.pretokens) <= 300
    assert all(truth[word] - counts.undercount <= counts.pretokens[word] <= truth[word] for word in truth)
    assert any(counts.pretokens[word] < truth[word] for word in counts.pretokens)


def test_a_long_text_is_counted_in_chunks(monkeypatch):
    monkeypatch.setattr(counting, "CHUNK_CHARACTERS", 500)
    counts = PretokenCounts()
    counts.add_text(corpus())
    assert counts.pretokens == Counter(iterate_pretokens(corpus()))


def test_sample_is_independent_of_the_order():
    texts = [f"text {index} " * 40 for index in range(50)]
    forward = PretokenCounts(sample_limit=4000)
    backward = PretokenCounts(sample_limit=4000)
    for text in texts:
        forward.add_text(text)
    for text in reversed(texts):
        backward.add_text(text)
    assert sorted(forward.sample) == sorted(backward.sample)
