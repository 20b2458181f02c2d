"""Test the FLOPs formulas against the model's parameters, a count over all pairs, the traced program and XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slm_jax.config.schema import ModelConfig
from slm_jax.model import ops
from slm_jax.performance import flops
from slm_jax.training import mfu
from slm_jax.training.optimizer import make_optimizer
from slm_jax.training.steps import make_steps
from tests.helpers import tiny_config, tiny_model


@pytest.mark.parametrize("fields", [{}, {"kv_heads": 1}, {"tie_weights": False, "depth": 3}])
def test_matmul_parameters_equal_those_of_the_model(fields):
    model = tiny_model(**fields)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    matrices = sum(x.size for x in jax.tree.leaves(params["blocks"]) if x.ndim == 3)
    assert flops.matmul_parameters(model.config, 61) == matrices + 61 * 32


@pytest.mark.parametrize(("length", "window"), [(7, 0), (7, 3), (7, 7), (7, 100), (1, 1)])
def test_mean_context_counts_the_pairs(length, window):
    pairs = sum(1 for t in range(length) for s in range(t + 1) if not window or t - s < window)
    assert flops.mean_context(length, window) == pytest.approx(pairs / length)


def test_training_costs_three_forward_passes():
    config = ModelConfig()
    forward = flops.forward_flops_per_token(config, 2048, 256)
    assert flops.train_flops_per_token(config, 2048, 256) == 3 * forward
    assert forward == 2 * flops.matmul_parameters(config, 2048) + 4 * 4 * 192 * 128.5


@pytest.mark.parametrize("window", [0, 100])
def test_flops_by_attended_keys_are_those_of_full_windows(window):
    config = ModelConfig(window=window)
    by_keys = flops.token_flops(config, 2048, 256)
    assert by_keys.at() == pytest.approx(flops.train_flops_per_token(config, 2048, 256))
    assert by_keys.at(np.array([1.0, 64.5])).tolist() == pytest.approx(
        [flops.train_flops_per_token(ModelConfig(), 2048, length) for length in (1, 128)]
    )


SHAPES = {
    "plain": {},
    "grouped queries": {"kv_heads": 1},
    "window": {"window": 5},
    "untied": {"tie_weights": False, "depth": 3},
    "no query-key norm": {"qk_norm": False, "mlp_dim": 200},
    "scanned, recomputed, padded": {"scan_layers": True, "remat": "full", "vocab_multiple": 64, "mlp_multiple": 32},
    "wide heads, biases": {"head_dim": 12, "qkv_bias": True, "kv_heads": 2},
    "some layers with a window": {"window": 5, "full_layers": (0,), "nope_layers": (0,), "depth": 3},
    "parts of the speed runs": {"kv_heads": 2, "mlp": "relu2", "attention_gate": True, "value_embeddings": (0, 2)}
    | {"residual_scales": True, "depth": 3, "window": 5, "window_pattern": "SL", "logit_softcap": 15.0},
    "all": {"kv_heads": 2, "window": 7, "tie_weights": False, "heads": 8, "dropout": 0.1},
}


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_parameters_equal_those_of_the_model(fields):
    model = tiny_model(**fields)
    assert flops.parameters(model.config, 61) == sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def model_config(dtype="float32", **fields):
    return tiny_config(train__dtype=dtype, **{f"model__{name}": value for name, value in fields.items()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_formula_equals_the_products_of_the_naive_program(fields, dtype):
    """Both count the same products, and only products."""
    counts = mfu.count(model_config(dtype, **fields), 61)
    assert counts.products == counts.formula_square
    assert counts.formula < counts.formula_square


@pytest.mark.parametrize("fields", [{}, {"kv_heads": 1, "tie_weights": False}, {"window": 64}])
def test_formula_agrees_with_xla(fields):
    """XLA counts element-wise operations too: norms, rotations, softmax, SiLU and the loss, forward and backward.

    At this width they are about a hundredth of the products.
    """
    shape = {"dim": 512, "depth": 3, "heads": 8, "mlp_dim": 2048, **fields}
    config = tiny_config(train__sequence_length=256, **{f"model__{name}": value for name, value in shape.items()})
    counts = mfu.count(config, 4096)
    assert counts.xla is not None
    assert 1.0 <= counts.xla / counts.formula_square < 1.02


def test_xla_counts_a_scan_once_and_the_trace_all_iterations():
    def looped(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=7)[0]

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    one = 2 * 64**3
    assert flops.traced_flops(looped, x) == (7 * one, ())
    assert one <= flops.xla_flops(looped, x) < 1.1 * one


def test_trace_includes_nested_programs():
    x = jax.ShapeDtypeStruct((8, 4, 6), jnp.float32)
    w = jax.ShapeDtypeStruct((6, 5), jnp.float32)
    one = 2 * 8 * 4 * 6 * 5
    product = lambda a, b: jnp.einsum("bti,io->bto", a, b)  # noqa: E731
    assert flops.traced_flops(product, x, w).flops == one
    assert flops.traced_flops(jax.jit(product), x, w).flops == one
    # The forward product and both gradients; rematerialization adds the product, which the square's gradient needs.
    squared = lambda a, b: jnp.sum(product(a, b) ** 2)  # noqa: E731
    assert flops.traced_flops(jax.grad(squared, (0, 1)), x, w).flops == 3 * one
    assert flops.traced_flops(jax.grad(jax.checkpoint(squared), (0, 1)), x, w).flops == 4 * one
    either = lambda a, b: jax.lax.cond(a[0, 0, 0] > 0, lambda: product(a, b), lambda: a[..., :5])  # noqa: E731
    assert flops.traced_flops(either, x, w).flops == one
    handwritten = lambda a, b: jnp.sum(ops.matmul(a, b, jnp.dtype("bfloat16")))  # noqa: E731
    assert flops.traced_flops(handwritten, x, w).flops == one
    assert flops.traced_flops(jax.grad(handwritten, (0, 1)), x, w).flops == 3 * one  # without recomputation


def test_loop_of_unknown_length_is_reported_as_uncounted():
    def until(x):
        return jax.lax.while_loop(lambda c: c[0, 0] < 10, lambda c: c @ c, x)

    assert flops.traced_flops(until, jax.ShapeDtypeStruct((4, 4), jnp.float32)) == (0.0, ("while",))


@pytest.mark.parametrize("fields", [{}, {"kv_heads": 1, "mlp_dim": 200}])
def test_newton_schulz_formula_equals_the_trace(fields):
    config = model_config(**fields)
    steps = make_steps(config, 61)
    state = jax.eval_shape(steps.init)
    optimizer = make_optimizer(config.optimizer, 20, jnp.dtype("float32"))
    traced = flops.traced_flops(optimizer.update, state.params, state.opt_state, state.params)
    assert traced == (flops.optimizer_flops(config.model, "muon"), ())
    assert flops.optimizer_flops(config.model, "adamw") == 0


def test_real_step_adds_score_recomputation_and_optimizer():
    """Compare the real step with the naive one on a short sequence.

    It is one block of queries, for which blockwise attention computes the full square. It adds the scores, recomputed
    in the backward pass, a sixth of attention's FLOPs, and the products of the optimizer.
    """
    config = model_config()
    counts = mfu.count(config, 61)
    tokens = config.train.batch_size * config.train.sequence_length
    scores_again = tokens * 2 * config.model.depth * config.model.dim * config.train.sequence_length
    assert counts.written == counts.formula_square + scores_again + counts.optimizer
    assert counts.uncounted == ()


def test_all_iterations_of_loops_in_the_real_step_are_counted():
    once = mfu.count(model_config(), 61).written
    assert mfu.count(model_config(scan_layers=True), 61).written == once
    assert mfu.count(tiny_config(train__accumulation=4), 61).written == once
    assert mfu.count(model_config(remat="full"), 61).written > once


@pytest.mark.parametrize("fields", [{}, {"kv_heads": 1}, {"tie_weights": False}])
def test_formula_equals_the_trace_of_cached_generation(fields):
    model = tiny_model(**fields)
    cache = model.empty_cache(1, 24)
    one = jnp.zeros((1, 1), jnp.int32)

    def token(ids, cache):
        x, _ = model.hidden_cached(ids, jnp.full((1, 1), 23), cache)
        return model.logits(x)

    context = 24  # tokens that the new one attends to, itself included
    expected = 2 * flops.matmul_parameters(model.config, 61) + 4 * model.config.depth * model.config.dim * context
    assert flops.traced_flops(token, one, cache).flops == expected
