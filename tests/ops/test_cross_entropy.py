"""The chunked cross entropy equals the naive one and a closed form; labels are taken as they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.batch import IGNORE
from slm_jax.ops import cross_entropy, naive_cross_entropy
from tests.helpers import BFLOAT16, FLOAT32, cosine


def inputs(b, t, d=16, v=37, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(b, t, d)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(v, d)), jnp.float32)
    labels = rng.integers(0, v, (b, t))
    labels[rng.random((b, t)) < 0.2] = IGNORE
    return x, head, jnp.asarray(labels, jnp.int32)


@pytest.mark.parametrize(("b", "t"), [(1, 1), (2, 5), (3, 700), (1500, 2)])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_equals_naive_in_float32(b, t, z_loss):
    x, head, labels = inputs(b, t)
    results = []
    for f in (cross_entropy, naive_cross_entropy):
        loss = lambda x, head, f=f: (lambda s: (s.loss, s))(f(x, head, labels, FLOAT32, z_loss))  # noqa: E731
        (_, sums), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, head)
        results.append((sums, grads))
    (sums, grads), (naive_sums, naive_grads) = results
    np.testing.assert_allclose(np.array(sums), np.array(naive_sums), rtol=1e-6)
    for fast, naive in zip(grads, naive_grads, strict=True):
        np.testing.assert_allclose(fast, naive, rtol=1e-6, atol=1e-6 * float(jnp.max(jnp.abs(naive))))


def test_bfloat16_gradients_point_the_same_way():
    x, head, labels = inputs(4, 300)
    grad = lambda f, dtype: jax.grad(lambda x, h: f(x, h, labels, dtype).loss, argnums=(0, 1))(x, head)  # noqa: E731
    assert cosine(grad(cross_entropy, BFLOAT16), grad(naive_cross_entropy, FLOAT32)) > 0.9999


def test_closed_form():
    """With a head of zeros every token has probability 1 / V."""
    x, head, labels = inputs(2, 9)
    sums = cross_entropy(x, head * 0, labels, FLOAT32)
    known = int((labels != IGNORE).sum())
    assert float(sums.tokens) == known
    assert float(sums.nll) == pytest.approx(known * np.log(37), rel=1e-6)


def test_nothing_to_predict_gives_zero_and_no_nan():
    x, head, labels = inputs(2, 9)
    blank = jnp.full_like(labels, IGNORE)
    sums = cross_entropy(x, head, blank, FLOAT32)
    grads = jax.grad(lambda x, h: cross_entropy(x, h, blank, FLOAT32).loss, argnums=(0, 1))(x, head)
    assert float(sums.loss) == float(sums.tokens) == 0
    assert all(bool(jnp.all(g == 0)) for g in grads)


def test_accuracy_counts_the_most_probable_token():
    head = jnp.eye(5)
    x = jnp.eye(5)[jnp.array([[0, 1, 2, 3]])]
    assert float(cross_entropy(x, head, jnp.array([[0, 1, 2, 4]]), FLOAT32).correct) == 3
