"""Test the chunked cross entropy against the naive one, the definition and closed forms."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.distributed.platform import Platform
from slm_jax.model.ops import ContextTokens, LossWeights, cross_entropy, naive_cross_entropy
from slm_jax.model.ops.cross_entropy import _chunk_count
from slm_jax.utils.batch import IGNORE_INDEX
from tests.helpers import BFLOAT16, FLOAT32, cosine

TPU = Platform("tpu")


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
        (_, sums), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, head)
        yield sums, grads


@pytest.mark.parametrize(("b", "t"), [(1, 1), (2, 5), (3, 700), (1500, 2)])
@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(z_loss=0.01), LossWeights(0.01, ul_alpha=0.5)])
def test_equals_naive_in_float32(b, t, weights):
    x, head, labels = inputs(b, t)
    (sums, grads), (naive_sums, naive_grads) = both(0.3 * x, head, labels, FLOAT32, weights, context_tokens(b, t))
    np.testing.assert_allclose(np.array(sums), np.array(naive_sums), rtol=1e-6)
    for fast, naive in zip(grads, naive_grads, strict=True):
        np.testing.assert_allclose(fast, naive, rtol=1e-6, atol=2e-6 * float(jnp.max(jnp.abs(naive))))


@pytest.mark.parametrize(("dtype", "tolerance"), [(FLOAT32, 2e-6), (BFLOAT16, 0.03)])
def test_capped_logits_equal_naive(dtype, tolerance):
    """With every term, and rows of padding, whose capped logits still have no probability."""
    x, head, labels = inputs(2, 9)
    labels = jnp.minimum(labels, 29)
    rest = (dtype, LossWeights(0.01, ul_alpha=0.5), context_tokens(2, 9, v=30), 30)
    loss = lambda x, head: cross_entropy(x, head, labels, *rest, TPU, 2.5).loss  # noqa: E731
    naive = lambda x, head: naive_cross_entropy(x, head, labels, *rest, 2.5).loss  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, head)
    expected, expected_grads = jax.jit(jax.value_and_grad(naive, argnums=(0, 1)))(x, head)
    assert float(value) == pytest.approx(float(expected), rel=tolerance)
    for fast, slow in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=tolerance * float(jnp.max(jnp.abs(slow))))


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


def repetition(p, label, v=37, d=16):
    """Return one position that repeats token 3 with a probability near p; exact in bfloat16, as is every input."""
    x, head, _ = inputs(1, 1, d, v)
    x = x.astype(BFLOAT16).astype(FLOAT32).at[..., -1].set(1.0)
    head = 0.3 * head
    logits = np.asarray(head @ x[0, 0])
    others = np.log(np.sum(np.exp(np.delete(logits, 3))))
    head = head.at[3, -1].add(float(others + np.log(p / (1 - p)) - logits[3])).astype(BFLOAT16).astype(FLOAT32)
    return x, head, jnp.array([[label]]), ContextTokens.from_batch(jnp.array([[3]]))


def exact_gradients(x, head, labels, weights):
    """Return p of the repeated token and the gradients by hidden states and head, in float64 without a clamp."""
    x, head = np.asarray(x[0, 0], np.float64), np.asarray(head, np.float64)
    logits = head @ x
    others = np.exp(logits - logits[3])
    others[3] = 0
    rest = np.sum(others)  # (1 - p) / p
    p = np.exp(logits - logits[3]) / (1 + rest)
    log_z = logits[3] + np.log1p(rest)
    dlogits = p * (1 + 2 * weights.z_loss * log_z)
    dlogits[int(labels[0, 0])] -= 1
    if int(labels[0, 0]) != 3:
        dlogits += weights.ul_alpha * np.where(np.arange(len(p)) == 3, p[3], -p / rest)
    return p[3], dlogits @ head, np.outer(dlogits, x)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("weights", [LossWeights(ul_alpha=1.0), LossWeights(0.01, ul_alpha=0.2), LossWeights(0, 20.0)])
@pytest.mark.parametrize("p", [0.3, 0.59, 0.61, 0.9, 0.99, 0.999, 0.9999])
def test_gradient_of_a_probable_repetition(p, weights, dtype):
    """The odds p / (1 - p) grow without bound, but their effect on the logits does not."""
    x, head, labels, context = repetition(p, label=5)
    exact_p, *expected = exact_gradients(x, head, labels, weights)
    assert exact_p == pytest.approx(p, rel=0.05)
    assert (1 - exact_p) == pytest.approx(1 - p, rel=0.05)
    loss = lambda x, head: cross_entropy(x, head, labels, dtype, weights, context).loss  # noqa: E731
    dx, dhead = jax.grad(loss, argnums=(0, 1))(x, head)
    assert np.linalg.norm(dx[0, 0] - expected[0]) < 0.01 * np.linalg.norm(expected[0])
    np.testing.assert_allclose(dhead, expected[1], rtol=0.01, atol=1e-6)  # every token of the vocabulary


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_certain_repetition_is_clamped(dtype):
    """The term is constant where 1 - p is below 1e-5: only the cross entropy has a gradient there."""
    x, head, labels, context = repetition(1 - 1e-6, label=5)
    loss = lambda head, alpha: cross_entropy(x, head, labels, dtype, LossWeights(0.0, alpha), context).loss  # noqa: E731
    assert float(loss(head, 2.0) - loss(head, 0.0)) == pytest.approx(-2 * np.log(1e-5), rel=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(head, 2.0), jax.grad(loss)(head, 0.0), rtol=1e-6, atol=1e-9)


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
    loss = lambda f, dtype: lambda x, head: f(x, head, labels, dtype, *rest).loss  # noqa: E731
    grad = lambda f, dtype: jax.jit(jax.grad(loss(f, dtype), argnums=(0, 1)))(x, head)  # noqa: E731
    assert cosine(grad(cross_entropy, BFLOAT16), grad(naive_cross_entropy, FLOAT32)) > 0.9999


def test_bfloat16_logits_against_float32():
    """Hidden states in bfloat16 give logits in bfloat16, whose errors average out.

    A logit of size l is off by at most l / 2^9, here 8 / 512 and at random, and so is the loss of a position; the
    gradient of a probability p is off by p times that. 1,200 positions leave 1/30 of it in the mean.
    """
    x, head, labels = inputs(4, 300)
    x = x.astype(BFLOAT16)
    score = lambda x, head: cross_entropy(x, head, labels, BFLOAT16, platform=TPU)  # noqa: E731
    loss = lambda x, head: (lambda sums: (sums.loss, sums))(score(x, head))  # noqa: E731
    for_dtype = lambda x: jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, head)  # noqa: E731
    (_, sums), (dx, dhead) = for_dtype(x)
    (_, exact), exact_grads = for_dtype(x.astype(FLOAT32))
    assert (dx.dtype, dhead.dtype) == (BFLOAT16, FLOAT32)
    assert float(sums.nll) == pytest.approx(float(exact.nll), rel=8 / 512 / 30)
    assert float(sums.correct) == pytest.approx(float(exact.correct), rel=0.02)
    assert cosine((dx, dhead), exact_grads) > 0.9999
    evaluated = jax.jit(score)(x, head)  # without gradients: float32 logits
    np.testing.assert_allclose(np.array(evaluated), np.array(exact), rtol=1e-6)


def test_equal_logits_share_a_correct_position():
    """Two tokens with the same largest logit, one of them the label: half a position."""
    x = jnp.ones((1, 1, 4), BFLOAT16)
    head = jnp.zeros((5, 4)).at[jnp.array([1, 3])].set(1.0)
    score = lambda x: cross_entropy(x, head, jnp.array([[3]]), BFLOAT16)  # noqa: E731
    (_, sums), _ = jax.value_and_grad(lambda x: (lambda sums: (sums.loss, sums))(score(x)), has_aux=True)(x)
    assert float(sums.correct) == 0.5


def test_number_of_chunks_by_platform():
    """Half a GiB of logits at a time, on GPUs of logits and their gradient unless there are many chunks."""
    rows = (4, 8, 16, 32, 64)

    def counts(platform):
        return [_chunk_count(each * 1024, 1024, 32_768 * 2, platform) for each in rows]

    assert counts(TPU) == [1, 1, 2, 4, 8]
    assert counts(Platform("gpu")) == [1, 2, 4, 4, 8]
    assert counts(Platform("cpu")) == [4, 8, 16, 32, 64]


@pytest.mark.parametrize(("platform", "positions"), [(TPU, 40), (Platform("gpu"), 80)])
def test_chunks_of_accelerators_add_up_to_the_same_sums_and_gradients(platform, positions, monkeypatch):
    x, head, labels = inputs(3, 50)
    rest = (FLOAT32, LossWeights(0.01), None, 0)
    loss = lambda x, head: cross_entropy(x, head, labels, *rest, platform).loss  # noqa: E731
    module = sys.modules[cross_entropy.__module__]  # the package has a function of that name
    monkeypatch.setattr(module, "_LOGIT_BYTES", positions * 37 * 4)
    assert _chunk_count(3 * 50, 50, 37 * 4, platform) == 4
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, head)
    naive = jax.value_and_grad(lambda x, head: naive_cross_entropy(x, head, labels, *rest).loss, argnums=(0, 1))
    expected, expected_grads = jax.jit(naive)(x, head)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for fast, slow in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=2e-6 * float(jnp.max(jnp.abs(slow))))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_logits_of_a_validation_take_no_more_memory_than_those_of_training(dtype, monkeypatch):
    """Without gradients they are float32, where hidden states are bfloat16 as well."""
    x, head, labels = inputs(3, 50)
    module = sys.modules[cross_entropy.__module__]
    monkeypatch.setattr(module, "_LOGIT_BYTES", 40 * 37 * 4)  # 40 of 150 positions
    score = lambda x: cross_entropy(x, head, labels, dtype, platform=TPU)  # noqa: E731
    program = jax.jit(score).lower(x.astype(dtype)).as_text()
    rows = [int(rows) for rows in re.findall(r"tensor<(\d+)x37xf32>", program)]
    assert max(rows) <= 40
    expected = naive_cross_entropy(x.astype(dtype), head, labels, dtype)
    np.testing.assert_allclose(np.array(jax.jit(score)(x.astype(dtype))), np.array(expected), rtol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_gradient_of_the_logits_is_not_transposed_on_cpu(dtype):
    x, head, labels = inputs(2, 64, v=640)
    grad = jax.grad(lambda head: cross_entropy(x, head, labels, dtype, platform=Platform("cpu")).loss)
    program = jax.jit(grad).lower(head).compile().as_text()
    assert "[128,640]" in program
    assert "[640,128]" not in program


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


def test_float16_keeps_gradients_of_improbable_tokens_and_applies_the_loss_scale_to_float32():
    """A probability of 1e-8 is 0 in float16, and 2^17 is infinite; neither may reach the gradients."""
    tokens, width, scale = 8, 16, 2.0**17
    x_1xTxD = jnp.zeros((1, tokens, width)).at[:, :, 0].set(1.0)
    head_VxD = jnp.zeros((4, width)).at[:, 0].set(jnp.array([9.0, -9.5, -7.0, -20.0]))
    labels_1xT = jnp.zeros((1, tokens), jnp.int32)

    def scaled_gradients(dtype):
        def loss(x, head):
            return cross_entropy(x, head, labels_1xT, jnp.dtype(dtype), platform=Platform("gpu", "7.5")).loss

        pull_back = lambda x, head, scale: jax.vjp(loss, x, head)[1](scale)  # noqa: E731
        return jax.jit(pull_back)(x_1xTxD.astype(dtype), head_VxD, jnp.float32(scale))

    exact_dx, exact_dhead = scaled_gradients("float32")
    dx, dhead = scaled_gradients("float16")
    assert dx.dtype == jnp.float16
    assert 0 < exact_dhead[1, 0] / scale / tokens < 2e-8
    np.testing.assert_allclose(dhead[:3], exact_dhead[:3], rtol=2e-2)
    np.testing.assert_allclose(dx, exact_dx, rtol=2e-2, atol=1e-6)
