"""Best-fit batches against a naive packer and against rows written out document by document."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data.batches.best_fit import BestFitBatches, BestFitRows, pack, sequential_best_fit_batches
from slm_jax.data.batches.packed import empty_batch
from slm_jax.data.corpus.corpus import MixturePart
from slm_jax.training.context import count_input_tokens, mean_context
from slm_jax.utils.batch import IGNORE_INDEX
from tests.data.test_batches import EOS, LENGTHS, label_counts, stream_of


def naive_pack(sizes, length):
    """Return the sizes in each row, with every piece placed by itself into the fullest row that it fits into."""
    rows = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in rows if sum(row) + size <= length]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            rows.append([size])
    return rows


@given(sizes=st.lists(st.integers(1, 20), max_size=60))
@settings(max_examples=80, deadline=None)
def test_pack_leaves_the_space_that_a_naive_packer_leaves(sizes):
    rows_of = pack(np.array(sizes, np.int32), 20)
    expected = naive_pack(sizes, 20)
    filled = np.bincount(rows_of, sizes, minlength=len(expected)) if sizes else np.zeros(0)
    assert len(filled) == len(expected)
    assert sorted(filled.tolist()) == sorted(map(sum, expected))


def test_rows_are_whole_documents_in_segments_of_their_own():
    """Documents count up, so that the first id after an <EOS> identifies one, and its length."""
    stream = stream_of(LENGTHS, shards=2)
    length = 40
    starts = np.concatenate([[0], np.cumsum(np.array(LENGTHS) - 1)[:-1]])
    ids = [[*range(first, first + size - 1), EOS] for first, size in zip(starts, LENGTHS, strict=True)]
    pieces = [each[at : at + length] for each in ids for at in range(0, len(each), length)]
    rows = BestFitRows(stream, length)
    found = []
    for index in range(rows.count):
        row = {name: array[0] for name, array in empty_batch(1, length, segments=True).items()}
        rows.write_row(index, row)
        real = int(np.count_nonzero(row["labels"] != IGNORE_INDEX))
        assert (row["labels"][real:] == IGNORE_INDEX).all()
        assert (row["segment_ids"][real:] == row["segment_ids"][:real].max() + 1).all()
        segments = row["segment_ids"][:real]
        parts = [row["labels"][:real][segments == i].tolist() for i in range(segments[-1] + 1)]
        assert parts[0] in ids or parts[0][:length] in [each[:length] for each in ids] or len(parts) == 1
        for part in parts:
            at = row["labels"].tolist().index(part[0]) if part[0] != EOS else None
            if at is not None:
                assert row["positions"][at : at + len(part)].tolist() == list(range(len(part)))
                before = EOS if part in [each[:length] for each in ids] else part[0] - 1
                assert row["input_ids"][at : at + len(part)].tolist() == [before, *part[:-1]]
        found += parts
    assert sorted(found) == sorted(pieces)
    assert rows.padding == pytest.approx(1 - sum(LENGTHS) / (rows.count * length))


@pytest.mark.parametrize("length", [16, 64])
def test_every_token_is_a_label_once_per_epoch(length):
    prompts = [min(2, n - 1) if n <= 16 else 0 for n in LENGTHS]
    stream = stream_of(LENGTHS, shards=2, prompts=prompts)
    tokens = stream[0 : len(stream)]
    expected = Counter(tokens[~stream.prompt_mask(0, len(stream))].tolist())
    batches = BestFitBatches([MixturePart(stream, 1.0, "")], 1, length, seed=1)
    orders = []
    for epoch in range(2):
        steps = range(epoch * batches.windows, (epoch + 1) * batches.windows)
        made = [batches.at(step) for step in steps]
        assert label_counts(made) == expected
        assert sum(map(batches.num_bytes, steps)) == stream.num_bytes
        orders.append([batch["labels"].tolist() for batch in made])
    assert orders[0] != orders[1]
    in_order = list(sequential_best_fit_batches(stream, 3, length))
    assert label_counts(batch for batch, _ in in_order) == expected
    assert sum(size for _, size in in_order) == stream.num_bytes


def test_tokens_without_padding_are_counted_in_the_step():
    """Texts and instructions, one of a single token among them; padding of one position as well."""
    stream = stream_of([20, 30, 10, 9, 1, 12, 11], prompts=[5, 12, 3, 0, 0, 11, 1])
    rows = BestFitRows(stream, 12)
    for index in range(rows.count):
        batch = empty_batch(1, 12, segments=True)
        rows.write_row(index, {name: array[0] for name, array in batch.items()})
        sizes = [int(rows.pieces.sizes[piece]) for piece in rows.pieces_of(index)]
        for first_id in (5, 0):  # of a foreign tokenizer, id 0 may be any token
            inputs = {**batch, "input_ids": np.where(batch["positions"] == 0, batch["input_ids"] * first_id, 9)}
            assert int(count_input_tokens(inputs)) == sum(sizes)
            expected = sum(size * (size + 1) / 2 for size in sizes) / sum(sizes)
            assert float(mean_context(inputs, 0)) == pytest.approx(expected)


def test_padding_and_truncated_responses_are_reported():
    stream = stream_of([20, 30, 10, 9], prompts=[5, 12, 3, 0])
    batches = BestFitBatches([MixturePart(stream, 1.0, "a")], 2, 12, seed=0)
    assert list(batches.summary(10, total=False)) == ["13.89% padding"]  # 12 + 10 + 9 tokens in 3 rows
    warnings = list(batches.warnings(10))
    assert "1 of 3 responses are longer than a row of 12 tokens and lose their end" in warnings[0]
    assert "1 of 3 instructions are skipped" in warnings[1]
    assert "14% of the positions are padding" in warnings[2]
