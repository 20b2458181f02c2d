"""Batches: a function of position; labels are the next token; every token is a label once per epoch."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.config.schema import Config
from slm_jax.data.batches.best_fit import BestFitBatches
from slm_jax.data.batches.mixture import Mixture
from slm_jax.data.batches.modes import make_batches, validation_batches
from slm_jax.data.batches.packed import PackedBatches, sequential_batches, window
from slm_jax.data.batches.padded import PaddedBatches, PaddedRows, bucket_widths, sequential_padded_batches
from slm_jax.data.batches.prefetch import Prefetcher
from slm_jax.data.corpus.corpus import MixturePart
from slm_jax.data.corpus.stream import DOCUMENT_DTYPE, Shard, TokenStream
from slm_jax.distributed.sharding import make_mesh, shard_batch
from slm_jax.utils.batch import IGNORE_INDEX
from slm_jax.utils.errors import UserError
from tests.helpers import tiny_config

EOS = 999


def stream_of(lengths, shards=1, prompts=None, first=0):
    """Return a stream of documents of these lengths, <EOS> included.

    The other tokens count up from `first`, each of one byte.
    """
    prompts = prompts or [0] * len(lengths)
    made = []
    for part in np.array_split(np.arange(len(lengths)), shards):
        rows, ids = [], []
        for i in part:
            ids += [*range(first, first + lengths[i] - 1), EOS]
            first += lengths[i] - 1
            rows.append((len(ids), 0, lengths[i] - 1 - prompts[i], prompts[i], 0, 0))
        made.append(Shard(np.array(ids, np.uint16), np.array(rows, DOCUMENT_DTYPE), any(prompts)))
    return TokenStream(made, np.array([1] * EOS + [0], np.int32))


def label_counts(batches):
    """Count the labels of batches by token."""
    return Counter(int(x) for batch in batches for x in batch["labels"].ravel() if x != IGNORE_INDEX)


def test_epochs_of_one_text_are_stated_once_by_training():
    """`expectation` states them; a mixture has a number for each source."""
    stream = stream_of([20] * 30)
    assert list(PackedBatches(stream, 4, 16, seed=0).summary(10)) == ["10 steps are 1.05 epochs"]
    assert list(PackedBatches(stream, 4, 16, seed=0).summary(10, total=False)) == []


def test_labels_are_the_next_token():
    stream = np.arange(1000, dtype=np.uint16)
    batches = PackedBatches(stream, 4, 16, seed=0)
    for step in range(40):
        batch = batches.at(step)
        known = batch["labels"] != IGNORE_INDEX
        assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)
        assert batch["input_ids"].dtype == batch["labels"].dtype == np.int32
        assert ((batch["input_ids"][known] + 1) % 1000 == batch["labels"][known]).all()
        assert (batch["input_ids"][:, 1:][known[:, 1:]] == batch["labels"][:, :-1][known[:, 1:]]).all()


@given(n=st.integers(33, 300), length=st.integers(2, 16), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_token_is_a_label_once_per_epoch(n, length, seed):
    stream = np.arange(n, dtype=np.uint16)
    batches = PackedBatches(stream, 1, length, seed)
    for epoch in range(2):
        steps = range(epoch * batches.windows, (epoch + 1) * batches.windows)
        assert label_counts(batches.at(step) for step in steps) == Counter(range(n))
    assert label_counts(sequential_batches(stream, 3, length)) == Counter(range(n))


def test_batches_are_a_function_of_position():
    stream = np.random.default_rng(0).integers(0, 500, 5000).astype(np.uint16)
    first, second = (PackedBatches(stream, 8, 32, seed=1) for _ in range(2))
    forward = [first.at(step) for step in range(60)]
    for step in (59, 3, 31, 3, 0):
        again = second.at(step)
        assert all((again[name] == forward[step][name]).all() for name in again)
    other = PackedBatches(stream, 8, 32, seed=2).at(0)
    assert (other["input_ids"] != forward[0]["input_ids"]).any()


def test_epochs_differ_in_order_and_in_cuts():
    stream = np.arange(512, dtype=np.uint16)
    batches = PackedBatches(stream, 1, 32, seed=0)
    starts = [[int(batches.at(e * 16 + i)["labels"][0, 0]) for i in range(16)] for e in range(2)]
    assert sorted(starts[0]) != sorted(starts[1])
    assert starts[0] != sorted(starts[0])


def test_window_across_the_end_of_the_stream():
    row = window(np.arange(10, dtype=np.uint16), offset=7, index=1, length=8)
    assert row["input_ids"].tolist() == [4, 5, 0, 0, 0, 0, 0, 0]
    assert row["labels"].tolist() == [5, 6, *[IGNORE_INDEX] * 6]
    row = window(np.arange(10, dtype=np.uint16), offset=0, index=0, length=4)
    assert row["input_ids"].tolist() == [9, 0, 1, 2]


def test_stream_shorter_than_a_batch_is_reported():
    with pytest.raises(UserError, match=r"30 tokens, but one batch takes 2 x 16 = 32"):
        PackedBatches(np.arange(30, dtype=np.uint16), 2, 16, 0)


LENGTHS = [5, 40, 3, 17, 16, 2, 90, 9, 33, 1, 28, 12]


def test_segments_keep_documents_apart():
    stream = stream_of(LENGTHS, shards=3)
    tokens = stream[0 : len(stream)]
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)  # of each token
    position = np.concatenate([np.arange(n) for n in LENGTHS])  # of each token in its document
    assert np.array_equal(stream.document_starts(0, len(stream)), np.flatnonzero(position == 0))
    assert np.array_equal(stream.document_starts(5, 46), np.flatnonzero(position[:46] == 0)[1:])
    batches = PackedBatches(stream, 4, 16, 0, segments=True)
    rows = [
        {name: array[i] for name, array in batches.at(step).items()}
        for step in range(batches.windows)
        for i in range(4)
    ]
    for row in rows:
        count = int((row["labels"] != IGNORE_INDEX).sum())
        at = next(a for a in range(len(tokens)) if np.array_equal(np.roll(tokens, -a)[:count], row["labels"][:count]))
        expected = np.roll(document, -at)[:count]
        same = row["segment_ids"][:count, None] == row["segment_ids"][None, :count]
        assert np.array_equal(same, expected[:, None] == expected[None])
        positions = np.roll(position, -at)[:count]
        first = positions[0]
        in_first = np.cumsum(expected != expected[0]) == 0
        assert np.array_equal(row["positions"][:count], np.where(in_first, positions - first, positions))
        assert not np.isin(row["segment_ids"][count:], row["segment_ids"][:count]).any()
    plain = PackedBatches(stream, 4, 16, 0)
    assert all((batches.at(s)[name] == plain.at(s)[name]).all() for s in range(9) for name in ("input_ids", "labels"))


@pytest.mark.parametrize("shards", [1, 4])
def test_byte_counts_of_batches_are_exact(shards):
    stream = stream_of(LENGTHS, shards, prompts=[min(2, n - 1) for n in LENGTHS])
    everything = stream[0 : len(stream)]
    predicted = everything[~stream.prompt_mask(0, len(stream))]
    assert stream.num_bytes == np.count_nonzero(predicted != EOS)
    for batches in (PackedBatches(stream, 2, 16, 3), PaddedBatches([MixturePart(stream, 1, "")], 2, 64, 3)):
        for step in range(40):
            labels = batches.at(step)["labels"]
            assert batches.num_bytes(step) == np.count_nonzero((labels != IGNORE_INDEX) & (labels != EOS))
    for mode in ("packed", "segmented", "best-fit", "padded"):
        config = tiny_config(data__mode=mode, train__sequence_length=96)
        found = list(validation_batches(config, stream, 3))
        assert sum(size for _, size in found) == stream.num_bytes
        assert label_counts(batch for batch, _ in found) == Counter(predicted.tolist())


@pytest.mark.parametrize("length", [16, 64])
def test_padded_rows_hold_every_token_once_per_epoch(length):
    stream = stream_of(LENGTHS, shards=2)
    batches = PaddedBatches([MixturePart(stream, 1.0, "")], 3, length, seed=1)
    for epoch in range(3):
        made = [batches.at(step) for step in range(epoch * batches.batches, (epoch + 1) * batches.batches)]
        assert label_counts(made) == Counter(stream[0 : len(stream)].tolist())
        tokens = sum(int(batch["attention_mask"].sum()) for batch in made)
        area = sum(batch["labels"].size for batch in made)
        assert batches.padding == pytest.approx(1 - tokens / area)
    assert {batch["labels"].shape[1] for batch in made} <= set(bucket_widths(length))
    for batch in made:
        real = batch["attention_mask"] == 1
        assert ((batch["labels"] != IGNORE_INDEX) == real).all()
        assert (np.diff(batch["attention_mask"], axis=1) <= 0).all()  # padding comes last
        inner = real[:, 1:]
        assert (batch["input_ids"][:, 1:][inner] == batch["labels"][:, :-1][inner]).all()
    assert label_counts(batch for batch, _ in sequential_padded_batches(stream, 3, length)) == Counter(
        stream[0 : len(stream)].tolist()
    )


def test_truncated_and_skipped_responses_are_counted():
    stream = stream_of([10, 20, 30, 12], prompts=[4, 4, 16, 4])
    rows = PaddedRows(stream, 16)
    assert (rows.truncated_responses, rows.skipped, len(rows)) == (1, 1, 3)
    batches = PaddedBatches([MixturePart(stream, 1.0, "")], 4, 16, 0)
    assert [note.partition(" ")[0] for note in batches.summary(5)] == ["5"]
    assert list(batches.warnings(5)) == [
        "1 of 4 responses are longer than a row of 16 tokens and lose their end: --train.sequence_length 30 would hold "
        "all of them whole",
        "1 of 4 instructions are skipped, because their prompt alone fills a row of 16 tokens: --train.sequence_length "
        "30 would hold all of them whole",
    ]
    sizes = [40] * 90 + [100] * 8 + [1000] * 2
    (note,) = PaddedBatches([MixturePart(stream_of(sizes, prompts=[4] * 100), 1.0, "")], 4, 64, 0).warnings(100)
    assert note == (
        "10 of 100 responses are longer than a row of 64 tokens and lose their end: --train.sequence_length 128 would "
        "hold 95% of them whole, 1000 all"
    )
    labels = [batches.at(step)["labels"] for step in range(batches.batches)]
    assert label_counts({"labels": each} for each in labels) == Counter(
        [*range(4, 9), EOS, *range(13, 25), *range(61, 68), EOS]
    )
    with pytest.raises(UserError, match="every prompt fills a row of 4 tokens"):
        PaddedBatches([MixturePart(stream, 1.0, "x")], 4, 4, 0)


def test_mixture_keeps_its_shares_in_every_block():
    mixture = Mixture([3, 1, 0.5], seed=0)
    locations = [mixture.locate(i) for i in range(3000)]
    for source, share in enumerate((667, 222, 111)):
        assert sum(s == source for s, _ in locations[1000:2000]) == share
        assert [index for s, index in locations if s == source] == list(range(sum(s == source for s, _ in locations)))
    parts = [MixturePart(stream_of([50] * 9), 3, "a"), MixturePart(stream_of([50] * 9, first=450), 1, "b")]
    for batches in (PackedBatches(parts, 8, 16, 0), PaddedBatches(parts, 8, 50, 0)):
        seen = Counter()
        for step in range(250):
            labels = batches.at(step)["labels"]
            seen.update((labels[(labels != IGNORE_INDEX) & (labels != EOS)] >= 450).tolist())
        assert seen[True] / seen.total() == pytest.approx(0.25, abs=0.02)
    assert PackedBatches(parts, 8, 16, 0).epochs(250) == pytest.approx([1500 / 29, 500 / 29])
    assert list(PackedBatches(parts, 8, 16, 0).summary(250)) == ["250 steps are 51.72, 17.24 epochs of the sources"]
    assert PaddedBatches(parts[:1], 8, 50, 0).epochs(7) == [3.5]


def test_small_weights_get_their_share():
    assert Mixture([1, 0.004], seed=0).counts.tolist() == [996, 4]  # as before: blocks of 1,000
    for small, block in ((0.0004, 100_000), (0.00005, 1_000_000), (2e-6, 1_000_000)):
        mixture = Mixture([1, small], seed=0)
        assert mixture.counts.sum() == block
        assert mixture.counts[1] == pytest.approx(block * small, rel=0.02)
        assert mixture.drawn(3 * block) == (3 * mixture.counts).tolist()
        draws = np.flatnonzero(mixture._source == 1).tolist()
        assert [mixture.locate(draw)[1] for draw in draws] == list(range(len(draws)))
    parts = [MixturePart(stream_of([50] * 9), 1, "a"), MixturePart(stream_of([50] * 9, first=450), 1e-5, "b")]
    for batches in (PackedBatches(parts, 8, 16, 0), PaddedBatches(parts, 8, 50, 0)):
        assert ["b is never read in 5 steps" in text for text in batches.warnings(5)] == [True]
        assert list(batches.warnings(1_000_000)) == []


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(1e-5, 1), min_size=2, max_size=6))
def test_every_weight_gets_its_share(weights):
    mixture = Mixture(weights, seed=0)
    shares = np.array(weights) / sum(weights) * mixture.counts.sum()
    assert (mixture.counts > 0).all()
    assert np.abs(mixture.counts - shares).max() < 1


def batches_of_all_modes():
    stream = stream_of(LENGTHS * 3)
    parts = [MixturePart(stream, 2, "a"), MixturePart(stream_of([20] * 9, first=500), 1, "b")]
    padded, best_fit = PaddedBatches(parts, 8, 32, 5), BestFitBatches(parts, 8, 32, 5)
    return [PackedBatches(parts, 8, 16, 5), PackedBatches(stream, 8, 16, 5, True), padded, best_fit]


def test_hosts_and_devices_get_the_same_batch():
    for batches in batches_of_all_modes():
        for step in (0, 7, 1000):
            whole = batches.at(step)
            halves = [batches.at(step, host, 2) for host in range(2)]
            for name in whole:
                assert np.array_equal(np.concatenate([half[name] for half in halves]), whole[name])
                for devices in (1, 2, 4, 8):
                    mesh = make_mesh(tiny_config(mesh__data=devices))
                    sharded = shard_batch(mesh, whole)[name]
                    assert len(sharded.addressable_shards) == devices
                    assert np.array_equal(np.asarray(sharded), whole[name])


def test_batches_in_any_order_and_at_large_steps():
    for first, second in zip(batches_of_all_modes(), batches_of_all_modes(), strict=True):
        forward = {step: first.at(step) for step in (0, 1, 2, 60, 10**6)}
        for step in reversed(forward):
            again = second.at(step)
            assert all(np.array_equal(again[name], forward[step][name]) for name in again)


def test_prefetcher_returns_the_batches_and_raises_errors():
    batches = batches_of_all_modes()[0]
    with Prefetcher(batches, lambda arrays: arrays, 3, 40) as prefetcher:
        for step in range(3, 30):  # the context is left before the last step
            item = prefetcher.next()
            assert np.array_equal(item.batch["labels"], batches.at(step)["labels"])
            assert item.num_bytes == batches.num_bytes(step)
    assert not prefetcher._thread.is_alive()

    def broken(arrays):
        raise OSError("gone")

    with Prefetcher(batches, broken, 0, 9) as prefetcher, pytest.raises(OSError, match="gone"):
        prefetcher.next()


def test_no_batch_contains_validation_text(tmp_path):
    """From files to batches: held-out documents share no word with the batches."""
    from slm_jax.data.prepare import prepare
    from slm_jax.run.directory import Run

    words = lambda i: [f"w{i:03}x{j}" for j in range(40)]  # noqa: E731
    (tmp_path / "a.txt").write_text("<|endoftext|>\n".join(" ".join(words(i % 150)) + "\n" for i in range(200)))
    fields = {
        "data.files": (str(tmp_path / "a.txt"),),
        "data.cache": str(tmp_path / "cache"),
        "tokenizer.vocab_size": 400,
    }
    for mode in ("packed", "segmented", "padded"):
        config = Config.load(**fields, **{"data.mode": mode, "train.batch_size": 4, "train.sequence_length": 64})
        run = Run(tmp_path / mode)
        run.path.mkdir()
        tokenizer, corpus = prepare(config, run)
        batches = make_batches(config, corpus)
        seen = set()
        for step in range(100):
            for row in batches.at(step)["input_ids"]:
                seen.update(
                    word[:4] for word in tokenizer.decode(row[row != 0].tolist()).split()[1:-1] if len(word) > 5
                )
        held_out = {
            word[:4] for word in tokenizer.decode(corpus.validation[0 : len(corpus.validation)].tolist()).split()
        }
        trained = {word[:4] for word in tokenizer.decode(corpus.train[0 : len(corpus.train)].tolist()).split()}
        assert corpus.validation.num_documents > 2
        assert corpus.validation.num_documents + corpus.train.num_documents == 150
        assert not seen & (held_out - trained)
        assert not {f"w{i:03}" for i in range(150)} - (held_out | trained)
        assert not held_out & trained
