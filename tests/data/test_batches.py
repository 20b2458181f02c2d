"""Batches are a function of position; labels are the next token; every token is a target once per epoch."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.batch import IGNORE
from slm_jax.data.batches import Batches, in_order, window
from slm_jax.errors import UserError


def targets(batches):
    return Counter(int(x) for batch in batches for x in batch["labels"].ravel() if x != IGNORE)


def test_labels_are_the_next_token():
    stream = np.arange(1000, dtype=np.uint16)
    batches = Batches(stream, 4, 16, seed=0)
    for step in range(40):
        batch = batches.at(step)
        known = batch["labels"] != IGNORE
        assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)
        assert batch["input_ids"].dtype == batch["labels"].dtype == np.int32
        assert ((batch["input_ids"][known] + 1) % 1000 == batch["labels"][known]).all()
        assert (batch["input_ids"][:, 1:][known[:, 1:]] == batch["labels"][:, :-1][known[:, 1:]]).all()


@given(n=st.integers(33, 300), length=st.integers(2, 16), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_token_is_a_target_once_per_epoch(n, length, seed):
    stream = np.arange(n, dtype=np.uint16)
    batches = Batches(stream, 1, length, seed)
    for epoch in range(2):
        steps = range(epoch * batches.windows, (epoch + 1) * batches.windows)
        assert targets(batches.at(step) for step in steps) == Counter(range(n))
    assert targets(in_order(stream, 3, length)) == Counter(range(n))


def test_at_is_a_function_of_position():
    stream = np.random.default_rng(0).integers(0, 500, 5000).astype(np.uint16)
    first, second = (Batches(stream, 8, 32, seed=1) for _ in range(2))
    forward = [first.at(step) for step in range(60)]
    for step in (59, 3, 31, 3, 0):
        again = second.at(step)
        assert all((again[name] == forward[step][name]).all() for name in again)
    other = Batches(stream, 8, 32, seed=2).at(0)
    assert (other["input_ids"] != forward[0]["input_ids"]).any()


def test_epochs_differ_in_order_and_in_cuts():
    stream = np.arange(512, dtype=np.uint16)
    batches = Batches(stream, 1, 32, seed=0)
    starts = [[int(batches.at(e * 16 + i)["labels"][0, 0]) for i in range(16)] for e in range(2)]
    assert sorted(starts[0]) != sorted(starts[1])
    assert starts[0] != sorted(starts[0])


def test_window_at_the_seam():
    row = window(np.arange(10, dtype=np.uint16), offset=7, index=1, length=8)
    assert row["input_ids"].tolist() == [4, 5, 0, 0, 0, 0, 0, 0]
    assert row["labels"].tolist() == [5, 6, *[IGNORE] * 6]
    row = window(np.arange(10, dtype=np.uint16), offset=0, index=0, length=4)
    assert row["input_ids"].tolist() == [9, 0, 1, 2]


def test_too_short_a_stream_says_what_to_do():
    with pytest.raises(UserError, match=r"30 tokens, but one batch takes 2 x 16 = 32"):
        Batches(np.arange(30, dtype=np.uint16), 2, 16, 0)
