"""Test what the backward pass keeps and recomputes: the sizes of its residuals, and that nothing changes in value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from slm_jax.distributed.platform import Platform
from slm_jax.model.abstract import abstract_model
from slm_jax.model.block import RMSNorm, swiglu_width
from slm_jax.model.precision import Policy
from slm_jax.model.recomputation import choose_remat, choose_scan
from slm_jax.planning.cudnn import described_gpu
from slm_jax.training.objective import NextToken
from slm_jax.training.train_step import gradients
from tests.helpers import BFLOAT16, FLOAT32, random_ids, tiny_config

VOCAB = 61
CPU, TPU, GPU = Platform("cpu"), Platform("tpu"), Platform("gpu", "9.0")
TOKENS = 2 * 128


def kept_bytes(platform, remat):
    """Return the bytes of activations that the backward pass of one layer with bfloat16 activations keeps."""

    def kept(depth):
        options = {"model__remat": remat, "model__depth": depth, "model__scan_layers": False}
        config = tiny_config(train__dtype="bfloat16", train__residual_dtype="compute", **options)
        graph, params = abstract_model(config, VOCAB, platform)
        ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)
        shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
        shapes |= {shape[1:] for shape in shapes}  # of one layer
        hidden = lambda params, ids: nnx.merge(graph, params).hidden(ids)  # noqa: E731
        pullback = jax.eval_shape(
            lambda params, ids: jax.vjp(functools.partial(hidden, ids=ids), params)[1], params, ids
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback) if x.shape not in shapes)

    return kept(3) - kept(2)


@pytest.mark.parametrize(("platform", "statistics"), [(CPU, 0), (TPU, 4), (GPU, 3 * 4)])
def test_size_of_what_is_kept(platform, statistics, monkeypatch):
    """Closed form: input of the block, queries, keys, values, attention, its projection, gate and up, in bfloat16.

    The kernels also keep a float32 number for each query and head. If it were not kept, they would run again. On GPUs
    the norms of queries and keys keep one for each head as well.
    """
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # not installed everywhere
    model = tiny_config().model
    of_token = 2 * (6 * model.dim + 2 * swiglu_width(model)) + statistics * model.heads
    assert model.qk_norm
    with described_gpu((9, 0)):
        assert kept_bytes(platform, "elementwise") == TOKENS * of_token
        assert kept_bytes(platform, "full") == TOKENS * 2 * model.dim
        assert kept_bytes(platform, "none") > 1.5 * TOKENS * of_token


def test_norm_that_keeps_the_root_mean_square():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32)

    def value_and_grad(keep_rms):
        norm = RMSNorm(16, 1e-6, keep_rms=keep_rms)
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(norm(x))))(x)

    (value, grad), (expected, expected_grad) = value_and_grad(True), value_and_grad(False)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_choices():
    mixed, plain = Policy(BFLOAT16, BFLOAT16, GPU), Policy(BFLOAT16, FLOAT32, CPU)
    assert [choose_remat("auto", policy) for policy in (mixed, plain)] == ["elementwise", "none"]
    assert choose_remat("full", mixed) == "full"
    for platform, scans in ((CPU, [False, False]), (GPU, [False, True]), (TPU, [True, True])):
        assert [choose_scan("auto", depth, Policy(platform=platform)) for depth in (24, 25)] == scans
    assert [choose_scan(value, 8, mixed) for value in (True, False)] == [True, False]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_recomputed_values_are_the_same(scan_layers):
    """The same operations on the same values: gradients differ by the order of XLA's float32 sums only."""
    grads = {}
    for remat in ("none", "elementwise"):
        config = tiny_config(model__remat=remat, model__scan_layers=scan_layers)
        graph, abstract = abstract_model(config, VOCAB)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x, rng=rng: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), abstract)
        ids = random_ids((4, 17))
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        compute = functools.partial(gradients, graph=graph, objective=NextToken())
        grads[remat], _ = jax.jit(lambda params, batch, f=compute: f(params, batch, None))(params, batch)
    for a, b in zip(*map(jax.tree.leaves, grads.values()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.max(jnp.abs(a))))
