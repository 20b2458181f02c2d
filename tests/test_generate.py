"""Sampling draws what it says; generation continues texts of different lengths as the whole model would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.generate import Sampling, _advance, sample, stream
from tests.helpers import tiny_model

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8]]


def drawn(model, prompts, count, *args, **kwargs):
    return np.stack(list(stream(model, prompts, count, *args, **kwargs)), axis=1)


def test_greedy_equals_the_whole_model_run_again_at_each_token():
    model = tiny_model()
    rows = drawn(model, PROMPTS, 10, Sampling(temperature=0))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        text = list(prompt)
        for token in row:
            assert int(jnp.argmax(model(jnp.array([text]))[0, -1])) == token
            text.append(int(token))


def test_beyond_the_context_only_the_last_tokens_count():
    """With one layer, what lies further back than the context cannot reach the next token."""
    model = tiny_model(depth=1)
    rows = drawn(model, [[1, 2, 3, 4, 5, 6, 7, 8], [50, 51, 52, 4, 5, 6, 7, 8]], 1, Sampling(temperature=0), context=5)
    assert rows[0, 0] == rows[1, 0]
    windowed = tiny_model(depth=1, window=5)
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    for token in drawn(model, [text], 12, Sampling(temperature=0), context=5)[0]:
        assert int(jnp.argmax(windowed(jnp.array([text]))[0, -1])) == token
        text = [*text, int(token)]


def test_a_row_does_not_depend_on_its_neighbours_when_greedy():
    model = tiny_model()
    alone = drawn(model, [PROMPTS[0]], 8, Sampling(temperature=0))
    assert (drawn(model, PROMPTS, 8, Sampling(temperature=0))[0] == alone[0]).all()


def test_seed_reproduces():
    model = tiny_model(scale=2.0)
    first = drawn(model, PROMPTS, 12, Sampling(seed=1))
    assert (first == drawn(model, PROMPTS, 12, Sampling(seed=1))).all()
    assert (first != drawn(model, PROMPTS, 12, Sampling(seed=2))).any()


def frequencies(sampling, logits, count=20_000):
    keys = jax.random.split(jax.random.key(0), count)
    tokens = jax.vmap(lambda key: sample(logits[None], key, sampling)[0])(keys)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


PROBABILITIES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))


@pytest.mark.parametrize(
    ("sampling", "kept", "power"),
    [
        (Sampling(temperature=1.0, top_p=1.0), 5, 1.0),
        (Sampling(temperature=0.5, top_p=1.0), 5, 2.0),
        (Sampling(temperature=1.0, top_p=1.0, top_k=2), 2, 1.0),
        (Sampling(temperature=1.0, top_p=0.75), 3, 1.0),
        (Sampling(temperature=1.0, top_p=0.01), 1, 1.0),
        (Sampling(temperature=1.0, top_p=1.0, top_k=99), 5, 1.0),
    ],
)
def test_sampled_frequencies(sampling, kept, power):
    expected = np.where(np.arange(5) < kept, PROBABILITIES**power, 0)
    expected /= expected.sum()
    np.testing.assert_allclose(frequencies(sampling, LOGITS), expected, atol=0.015)  # 4 standard deviations


def test_suppressed_tokens_never_come():
    model = tiny_model()
    rows = drawn(model, PROMPTS, 30, Sampling(temperature=5.0, top_p=1.0), suppress=range(5, 61))
    assert set(rows.ravel().tolist()) <= set(range(5))


def test_values_out_of_range_are_told_together():
    with pytest.raises(UserError, match=r"temperature -1.*top_k -2.*top_p 0.*seed -1"):
        list(stream(tiny_model(), PROMPTS, 1, Sampling(temperature=-1, top_k=-2, top_p=0, seed=-1)))
    with pytest.raises(UserError, match="no tokens"):
        list(stream(tiny_model(), [[]], 1))


def test_other_seeds_and_lengths_compile_nothing():
    model = tiny_model(dim=48)
    drawn(model, [[1, 2]], 3, Sampling(seed=0))
    before = _advance._cache_size()
    drawn(model, [[1, 2, 3, 4]], 5, Sampling(seed=7))
    assert _advance._cache_size() == before
