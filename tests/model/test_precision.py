"""Test the precision policy: the dtypes that it chooses, what they change in the model, and the size of the errors."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slm_jax.distributed.platform import Platform
from slm_jax.model.abstract import abstract_model
from slm_jax.model.precision import Policy, describe_precision, processor_prefers_bfloat16
from slm_jax.training.objective import NextToken
from slm_jax.training.setup import _log_other_precision
from slm_jax.training.steps import make_steps
from slm_jax.training.train_step import gradients
from tests.helpers import BFLOAT16, FLOAT16, FLOAT32, random_ids, tiny_config

VOCAB = 61
UNIT_ROUNDOFF = 2.0**-9  # of bfloat16, which has 8 significant bits: the largest relative error of one rounding
UNIT_ROUNDOFFS = {"bfloat16": UNIT_ROUNDOFF, "float16": 2.0**-12}
CHOICES = [
    # platform, train.dtype, train.residual_dtype: operands of products, activations
    (Platform("cpu"), "bfloat16", "auto", BFLOAT16, FLOAT32),
    (Platform("cpu"), "bfloat16", "compute", BFLOAT16, BFLOAT16),
    (Platform("cpu"), "float32", "compute", FLOAT32, FLOAT32),
    (Platform("tpu"), "auto", "auto", BFLOAT16, BFLOAT16),
    (Platform("tpu"), "auto", "float32", BFLOAT16, FLOAT32),
    (Platform("gpu", "9.0"), "auto", "auto", BFLOAT16, BFLOAT16),
    (Platform("gpu", "7.5"), "auto", "auto", FLOAT16, FLOAT16),
    (Platform("gpu", "7.0"), "auto", "float32", FLOAT16, FLOAT32),
    (Platform("gpu", "6.1"), "auto", "auto", FLOAT32, FLOAT32),
    (Platform("gpu", "9.0"), "float32", "auto", FLOAT32, FLOAT32),
]


@pytest.mark.parametrize(("platform", "dtype", "residual", "compute", "activation"), CHOICES)
def test_choice(platform, dtype, residual, compute, activation):
    config = tiny_config(train__dtype=dtype, train__residual_dtype=residual)
    policy = Policy.choose(config, platform)
    assert (policy.compute, policy.activation, policy.platform) == (compute, activation, platform)
    assert hash(policy) == hash(Policy.choose(config, platform))
    assert describe_precision(config, platform).startswith(
        f"{compute} products and activations (" if activation != FLOAT32 else f"{compute} products ("
    )


def config_of(residual, dtype="bfloat16", **options):
    return tiny_config(train__dtype=dtype, train__residual_dtype=residual, **options)


def loss_and_gradients(config, params, batch):
    graph, _ = abstract_model(config, VOCAB)
    compute = functools.partial(gradients, graph=graph, objective=NextToken())
    grads, sums = jax.jit(lambda params, batch: compute(params, batch, None))(params, batch)
    return float(sums.loss / sums.tokens), grads


@pytest.fixture(scope="module")
def params_and_batch():
    params = make_steps(tiny_config(), VOCAB).init().params
    # Larger weights than the initial ones, so that attention and SwiGLU are not linear.
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 and x.shape[-1] > 8 else x, params)
    ids = random_ids((8, 17), VOCAB)
    return params, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def relative_errors(grads, expected):
    """Return the relative error of each parameter's gradient in the Euclidean norm, by its path."""
    norms = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), grads, expected)
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(norms)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("residual", ["float32", "compute"])
def test_gradients_against_float32(residual, dtype, params_and_batch):
    """Tolerance: roundings are independent, so that the errors of n of them in a row add up to sqrt(n) of one.

    A value passes about 20 roundings in each layer (operands and results of all operations), forth and back. The errors
    of the forward pass enter three times: by the values, by the derivatives there, and by the gradient from above.
    """
    params, batch = params_and_batch
    expected_loss, expected = loss_and_gradients(tiny_config(), params, batch)
    loss, grads = loss_and_gradients(config_of(residual, dtype), params, batch)
    bound = 3 * UNIT_ROUNDOFFS[dtype] * math.sqrt(2 * 20 * tiny_config().model.depth)
    errors = relative_errors(grads, expected)
    assert max(errors.values()) < bound, errors
    assert loss == pytest.approx(expected_loss, rel=bound)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def test_residual_stream_on_cpu_is_float32():
    """The program of a CPU is the same with and without the option: nothing is rounded in between."""
    ids = random_ids((2, 8))

    def program(residual):
        graph, params = abstract_model(config_of(residual), VOCAB, Platform("cpu"))
        return str(jax.make_jaxpr(lambda params: nnx.merge(graph, params).hidden(ids))(params))

    assert program("auto") == program("float32")


@pytest.mark.parametrize(
    ("vendor", "flags", "prefers"),
    [
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx512f avx512_bf16 avx512_fp16", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2 fma", False),
    ],
)
def test_processors_that_multiply_bfloat16_faster(vendor, flags, prefers):
    cpuinfo = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n"
    assert processor_prefers_bfloat16(cpuinfo) == prefers


@pytest.mark.parametrize("scan_layers", [False, True])
def test_activations_are_in_the_compute_dtype(scan_layers):
    """No product returns float32, and what the layers pass on is bfloat16; logits and the loss stay float32."""
    config = config_of("compute", model__scan_layers=scan_layers)
    graph, params = abstract_model(config, VOCAB, Platform("tpu"))
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    hidden, logits = jax.eval_shape(
        lambda params, ids: (nnx.merge(graph, params).hidden(ids), nnx.merge(graph, params)(ids)), params, ids
    )
    assert (hidden.dtype, logits.dtype) == (BFLOAT16, FLOAT32)
    program = jax.jit(lambda params, ids: nnx.merge(graph, params).hidden(ids)).lower(params, ids).as_text()
    width = tiny_config().model.dim
    linear = [line for line in program.splitlines() if "dot_general" in line and f"tensor<16x{width}xbf16>" in line]
    assert linear
    assert all(line.rstrip().endswith("xbf16>") for line in linear)


@pytest.mark.parametrize("options", [{}, {"model__kv_heads": 2, "model__window": 5, "model__attention": "naive"}])
def test_cached_equals_full_forward(options, params_and_batch):
    """Generation reads the same hidden states as training, up to the rounding of both."""
    config = config_of("compute", **options)
    steps = make_steps(config, VOCAB)
    model = steps.model(steps.init().params)
    ids = params_and_batch[1]["input_ids"][:2]
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)

    @nnx.jit
    def compute(model):
        cached, _ = model.hidden_cached(ids, positions, model.empty_cache(2, ids.shape[1]))
        return cached, model.hidden(ids)

    cached, full = compute(model)
    assert cached.dtype == full.dtype == BFLOAT16
    error = np.linalg.norm(np.float32(cached - full)) / np.linalg.norm(np.float32(full))
    assert error < UNIT_ROUNDOFF * math.sqrt(20 * config.model.depth)


def test_resume_with_other_dtypes_is_logged(tmp_path, caplog):
    """A run of an accelerator that an earlier version started had float32 activations."""
    run = SimpleNamespace(environment=tmp_path / "environment.json")
    run.environment.write_text(
        '{"calls": [{"precision": "bfloat16 products (an earlier reason), float32 parameters"}]}'
    )
    on_tpu, on_cpu = (describe_precision(config_of("auto"), Platform(name)) for name in ("tpu", "cpu"))
    with caplog.at_level("INFO", "slm_jax"):
        _log_other_precision(run, 3, on_cpu)
        _log_other_precision(run, 0, on_tpu)
        assert not caplog.messages
        _log_other_precision(run, 3, on_tpu)
    assert caplog.messages == [
        "note: this run now computes with bfloat16 products and activations, before with bfloat16 products"
    ]
