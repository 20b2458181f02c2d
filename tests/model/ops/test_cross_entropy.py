"""Test the chunked cross entropy against the naive one, the definition and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.model.ops import ContextTokens, LossWeights, cross_entropy, naive_cross_entropy
from slm_jax.utils.batch import IGNORE_INDEX
from tests.helpers import BFLOAT16, FLOAT32, cosine


def inputs(b, t, d=16, v=37, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(b, t, d)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(v, d)), jnp.float32)
    labels = rng.integers(0, v, (b, t))
    labels[rng.random((b, t)) < 0.2] = IGNORE_INDEX
    return x, head, jnp.asarray(labels, jnp.int32)


def context_tokens(b, t, v=37, seed=1):
    """Return tokens with repetitions, padding at the end of some sequences, two documents per sequence."""
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.integers(0, max(2, v // 3), (b, t)), jnp.int32)
    valid = jnp.asarray(np.arange(t) < rng.integers(1, t + 1, (b, 1)))
    return ContextTokens.from_batch(ids, valid, jnp.asarray(np.arange(t) >= t // 3, jnp.int32)[None].repeat(b, 0))


def both(x, head, labels, *rest):
    """Yield (sums, gradients) of the chunked and of the naive cross entropy."""
    for f in (cross_entropy, naive_cross_entropy):
        loss = lambda x, head, f=f: (lambda s: (s.loss, s))(f(x, head, labels, *rest))  # noqa: E731
        (_, sums), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, head)
        yield sums, grads


@pytest.mark.parametrize(("b", "t"), [(1, 1), (2, 5), (3, 700), (1500, 2)])
@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(z_loss=0.01), LossWeights(0.01, ul_alpha=0.5)])
def test_equals_naive_in_float32(b, t, weights):
    x, head, labels = inputs(b, t)
    (sums, grads), (naive_sums, naive_grads) = both(0.3 * x, head, labels, FLOAT32, weights, context_tokens(b, t))
    np.testing.assert_allclose(np.array(sums), np.array(naive_sums), rtol=1e-6)
    for fast, naive in zip(grads, naive_grads, strict=True):
        np.testing.assert_allclose(fast, naive, rtol=1e-6, atol=2e-6 * float(jnp.max(jnp.abs(naive))))


def test_unlikelihood_matches_its_definition():
    """Sum one by one over the distinct tokens of the segment so far, without padding and the label."""
    x, head, labels = inputs(3, 9, v=11)
    ids = np.random.default_rng(2).integers(0, 5, (3, 9))
    valid = np.arange(9) < np.array([[9], [6], [9]])
    segments = np.array([[0] * 9, [0] * 9, [0] * 4 + [1] * 5])
    labels = np.where(valid, np.asarray(labels), IGNORE_INDEX)
    logp = jax.nn.log_softmax(0.3 * x @ head.T, axis=-1)
    expected = 0.0
    for b, t in np.argwhere(labels != IGNORE_INDEX):
        before = {ids[b, s] for s in range(t + 1) if segments[b, s] == segments[b, t] and valid[b, s]}
        expected += sum(-np.log1p(-np.exp(float(logp[b, t, c]))) for c in before - {labels[b, t]})
    context = ContextTokens.from_batch(jnp.asarray(ids), jnp.asarray(valid), jnp.asarray(segments))
    sums = cross_entropy(0.3 * x, head, jnp.asarray(labels), FLOAT32, LossWeights(ul_alpha=2.0), context)
    assert float(sums.loss - sums.nll) == pytest.approx(2 * expected, rel=1e-5)


def test_a_certain_repetition_still_has_a_gradient():
    """Where 1 - p reaches its lower bound the term is constant, but its gradient is not zero."""
    x, head = jnp.full((1, 1, 1), 40.0), jnp.array([[1.0], [0.0], [-1.0]])
    context = ContextTokens.from_batch(jnp.zeros((1, 1), jnp.int32))
    sums = lambda head: cross_entropy(x, head, jnp.array([[1]]), FLOAT32, LossWeights(ul_alpha=1.0), context)  # noqa: E731
    assert np.isfinite(float(sums(head).loss))
    assert float(jax.grad(lambda h: sums(h).loss)(head)[0, 0]) > 0


def test_padding_rows_of_the_head_have_no_probability():
    x, head, labels = inputs(2, 9)
    labels = jnp.minimum(labels, 29)
    padded = both(x, head, labels, FLOAT32, LossWeights(), None, 30)
    exact = both(x, head[:30], labels, FLOAT32)
    for (sums, grads), (expected, expected_grads) in zip(padded, exact, strict=True):
        np.testing.assert_allclose(np.array(sums), np.array(expected), rtol=1e-6)
        np.testing.assert_allclose(grads[1][:30], expected_grads[1], rtol=1e-5, atol=1e-5)
        assert not np.any(grads[1][30:])


def test_bfloat16_gradients_have_the_same_direction():
    x, head, labels = inputs(4, 300)
    rest = (LossWeights(1e-3, ul_alpha=0.3), context_tokens(4, 300))
    grad = lambda f, dtype: jax.grad(lambda x, h: f(x, h, labels, dtype, *rest).loss, argnums=(0, 1))(x, head)  # noqa: E731
    assert cosine(grad(cross_entropy, BFLOAT16), grad(naive_cross_entropy, FLOAT32)) > 0.9999


def test_closed_form():
    """With a head of zeros every token has probability 1 / V."""
    x, head, labels = inputs(2, 9)
    sums = cross_entropy(x, head * 0, labels, FLOAT32)
    known = int((labels != IGNORE_INDEX).sum())
    assert float(sums.tokens) == known
    assert float(sums.nll) == pytest.approx(known * np.log(37), rel=1e-6)


def test_batch_without_labels_gives_zero_and_no_nan():
    x, head, labels = inputs(2, 9)
    no_labels = jnp.full_like(labels, IGNORE_INDEX)
    sums = cross_entropy(x, head, no_labels, FLOAT32)
    grads = jax.grad(lambda x, h: cross_entropy(x, h, no_labels, FLOAT32).loss, argnums=(0, 1))(x, head)
    assert float(sums.loss) == float(sums.tokens) == 0
    assert all(bool(jnp.all(g == 0)) for g in grads)


def test_accuracy_counts_the_most_probable_token():
    head = jnp.eye(5)
    x = jnp.eye(5)[jnp.array([[0, 1, 2, 3]])]
    assert float(cross_entropy(x, head, jnp.array([[0, 1, 2, 4]]), FLOAT32).correct) == 3
