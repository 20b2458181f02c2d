"""Batched and windowed log-probabilities against the NumPy model, one token at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.evaluation import scoring
from slm_jax.evaluation.scoring import Item, Scorer, windows
from slm_jax.utils.errors import UserError
from tests.evaluation.naive import NaiveModel
from tests.helpers import tiny_model


def items(lengths, firsts=None, vocab_size=61, seed=0):
    rng = np.random.default_rng(seed)
    firsts = firsts or [1] * len(lengths)
    return [
        Item(rng.integers(0, vocab_size, n).astype(np.int32), first) for n, first in zip(lengths, firsts, strict=True)
    ]


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 60), st.integers(1, 59), st.integers(1, 20), st.integers(1, 20))
def test_windows_score_every_token_once_with_enough_context(length, first, context, stride):
    first = min(first, length - 1)
    stride = min(stride, context)
    scored_tokens = []
    for begin, end, scored in windows(length, first, context, stride):
        assert 0 <= begin < scored <= end < length
        assert end - begin <= context
        scored_tokens += range(scored, end + 1)
        for target in range(scored, end + 1):
            assert target - begin >= min(target, context - stride + 1)
    assert scored_tokens == list(range(first, length))


def test_scores_match_the_naive_model_one_sentence_at_a_time():
    model = tiny_model(kv_heads=2)
    naive = NaiveModel(model)
    sequences = items([2, 3, 17, 33, 9, 24, 12, 30], [1, 2, 1, 30, 4, 1, 11, 1])
    results = Scorer(model, context=40, batch_tokens=320).score(sequences)
    for (ids, first), scores in zip(sequences, results, strict=True):
        rows = naive.logprobs(ids)[first - 1 :]
        labels = ids[first:]
        expected = rows[np.arange(len(labels)), labels]
        np.testing.assert_allclose(scores.logprobs, expected, atol=2e-4)
        assert scores.ranks.tolist() == (rows > expected[:, None]).sum(1).tolist()
        assert scores.total == pytest.approx(naive.total(ids, first), abs=2e-3)
        assert scores.greedy == naive.greedy(ids, first)


@pytest.mark.parametrize(("context", "stride"), [(8, 1), (8, 3), (8, 0)])
def test_long_texts_match_a_naive_sliding_window(context, stride):
    model = tiny_model(depth=1)
    naive = NaiveModel(model)
    sequences = items([29, 8, 9, 10, 30], [1, 1, 1, 4, 13])
    results = Scorer(model, context, stride, batch_tokens=64).score(sequences)
    step = stride or context // 2
    for (ids, first), scores in zip(sequences, results, strict=True):
        total = 0.0
        last_input = 0
        done = first - 1
        for target in range(first, len(ids)):
            if target > last_input:  # a new window: the first is full, later ones advance by `step`
                last_input = min(len(ids) - 1, max(context, done + step))
            begin = max(0, last_input - context)
            total += naive.logprobs(ids[begin : target + 1])[-1, ids[target]]
            if target == last_input:
                done = target
        assert scores.total == pytest.approx(total, abs=2e-3)


def test_a_uniform_model_gives_the_log_of_the_vocabulary_size():
    model = tiny_model(depth=1)
    model.embedding[...] = jnp.zeros_like(model.embedding[...])
    sequences = items([29, 8, 9, 10, 30])
    for (ids, _), scores in zip(sequences, Scorer(model, 8, batch_tokens=64).score(sequences), strict=True):
        np.testing.assert_allclose(scores.logprobs, -np.log(61), rtol=1e-6)
        assert scores.ranks.tolist() == ids[1:].tolist()  # ties are ordered by id, as in greedy decoding


def test_few_widths_are_compiled_and_batching_does_not_change_scores(monkeypatch):
    monkeypatch.setattr(scoring, "_MIN_WASTE", 500)
    lengths = [9] * 40 + [15] * 40 + [25] * 2 + [40] * 5 + [7] * 3
    sequences = items(lengths)
    model = tiny_model(depth=1, scale=2.0)
    shapes = set()
    real = scoring._score
    monkeypatch.setattr(scoring, "_score", lambda g, p, *arrays: shapes.add(arrays[0].shape) or real(g, p, *arrays))
    alone = Scorer(model, 64, batch_tokens=1).score(sequences[35:45])
    shapes.clear()
    together = Scorer(model, 64, batch_tokens=512).score(sequences)
    assert {shape[1] for shape in shapes} == {16, 48}
    assert len(shapes) == 2
    for one, many in zip(alone, together[35:45], strict=True):
        np.testing.assert_allclose(one.logprobs, many.logprobs, atol=1e-5)


def test_only_scored_positions_pass_through_the_output_head(monkeypatch):
    sizes = []
    real = scoring._score
    monkeypatch.setattr(scoring, "_score", lambda g, p, *arrays: sizes.append(arrays[1].size) or real(g, p, *arrays))
    model = tiny_model(depth=1)
    Scorer(model, 64, batch_tokens=2048).score(items([50] * 32, [49] * 32))
    assert sizes == [32]  # 32 of 2,048 positions are scored


def test_nan_weights_raise():
    model = tiny_model(depth=1)
    model.embedding[...] = jnp.full_like(model.embedding[...], jnp.nan)
    with pytest.raises(UserError, match="log-probabilities are not finite"):
        Scorer(model, 8, batch_tokens=64).score(items([29, 8, 9, 10, 30]))


def test_no_items_and_an_item_without_scored_tokens():
    scorer = Scorer(tiny_model(depth=1), 16)
    assert scorer.score([]) == []
    (scores,) = scorer.score([Item(np.array([1, 2], np.int32), 2)])
    assert scores.total == 0.0
    assert scores.greedy
