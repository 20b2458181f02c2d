"""Test the optional parts of the model against plain JAX: logits, loss and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slm_jax.config.schema import Config, ModelConfig
from slm_jax.generation import decode
from slm_jax.model.ops import LossWeights
from slm_jax.model.params import is_matrix
from slm_jax.model.precision import Policy
from slm_jax.model.transformer import Transformer
from slm_jax.training.dpo import loss as dpo
from slm_jax.training.objective import loss_sums
from tests.helpers import cosine, random_ids, tiny_model
from tests.model import naive_model

EVERYTHING = {
    "depth": 3,
    "kv_heads": 2,
    "tie_weights": False,
    "mlp": "relu2",
    "logit_softcap": 6.0,
    "window": 4,
    "window_pattern": "SL",
    "residual_scales": True,
    "value_embeddings": (2, 0),
    "attention_gate": True,
}
SINGLE = [
    {"mlp": "relu2"},
    {"logit_softcap": 3.0},
    {"window": 4, "window_pattern": "SSL"},
    {"residual_scales": True},
    {"value_embeddings": (1,)},
    {"attention_gate": True},
]
EXECUTIONS = [
    {"scan_layers": True, "remat": "full"},
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"remat": "elementwise"}, marks=pytest.mark.slow),
    pytest.param({"scan_layers": True, "remat": "dots"}, marks=pytest.mark.slow),
]
LENGTH = 13


def random_parts(params):
    """Return the parameters with random gates and scales, which start at constants."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noise = iter(keys)

    def change(path, leaf):
        key = next(noise)
        return leaf if is_matrix(path, leaf) else leaf + 0.5 * jax.random.normal(key, leaf.shape)

    return jax.tree_util.tree_map_with_path(change, params)


def model_and_params(**fields):
    model = tiny_model(**fields)
    graph, params = nnx.split(model, nnx.Param)
    return model.config, graph, random_parts(nnx.to_pure_dict(params))


def packed_batch():
    ids = random_ids((2, LENGTH + 1))
    segments = np.array([[0] * 5 + [1] * 8, [0] * LENGTH], np.int32)
    positions = np.arange(LENGTH)[None] + np.zeros((2, 1), np.int32)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "segment_ids": segments, "positions": positions}


def assert_equals_naive(options, z_loss=0.01):
    """Compare the mean loss and all gradients in float32; rotations are relative, so positions may run on."""
    config, graph, params = model_and_params(**options)
    batch = packed_batch()

    def loss(params):
        sums = loss_sums(nnx.merge(graph, params), batch, LossWeights(z_loss=z_loss))
        return sums.loss / sums.tokens

    def naive(params):
        logits = naive_model.logits(config, params, batch["input_ids"], batch["segment_ids"])
        log_z = jax.nn.logsumexp(logits, axis=-1)
        label = jnp.take_along_axis(logits, batch["labels"][..., None], axis=-1)[..., 0]
        return jnp.mean(log_z - label + z_loss * log_z**2)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    expected, expected_gradients = jax.jit(jax.value_and_grad(naive))(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    flat = jax.tree_util.tree_leaves_with_path(expected_gradients)
    for (path, wanted), got in zip(flat, jax.tree.leaves(gradients), strict=True):
        largest = float(jnp.abs(wanted).max())
        assert largest > 0, path
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=2e-5 * largest, err_msg=str(path))


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_all_parts_together_equal_plain_jax(execution):
    assert_equals_naive({**EVERYTHING, **execution})


@pytest.mark.slow
@pytest.mark.parametrize("options", SINGLE, ids=str)
def test_each_part_equals_plain_jax(options):
    assert_equals_naive(options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_close(dtype):
    """Products and activations of 8 or 11 bits: logits within 3 % of their size, gradients in the same direction."""
    config, _, params = model_and_params(**{**EVERYTHING, "logit_softcap": 30.0})
    policy = Policy(jnp.dtype(dtype), jnp.dtype(dtype))
    model = nnx.eval_shape(lambda: Transformer(config, 61, policy=policy, rngs=nnx.Rngs(0)))
    graph, _ = nnx.split(model, nnx.Param)
    batch = packed_batch()

    def loss(params):
        sums = loss_sums(nnx.merge(graph, params), batch)
        return sums.loss / sums.tokens

    def naive(params):
        logits = naive_model.logits(config, params, batch["input_ids"], batch["segment_ids"])
        label = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], axis=-1)
        return -jnp.mean(label)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    expected, expected_gradients = jax.jit(jax.value_and_grad(naive))(params)
    assert float(value) == pytest.approx(float(expected), rel=0.03)
    assert cosine(gradients, expected_gradients) > 0.99


@pytest.mark.slow
def test_preferences_and_decoding_bound_the_logits():
    """Log-probabilities of DPO and logits of decoding are those of the full forward pass with the bound."""
    model = tiny_model(logit_softcap=2.0)
    ids = random_ids((2, 2 * 9))
    labels = jnp.where(jnp.arange(18) % 9 > 3, jnp.roll(ids, -1, axis=1), -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": jnp.ones_like(ids)}
    rows, targets = ids.reshape(4, 9), labels.reshape(4, 9)
    log_p = jax.nn.log_softmax(model(rows))
    assert float(jnp.abs(model(rows)).max()) < 2.0
    chosen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    expected = jnp.where(targets >= 0, chosen, 0.0).sum(axis=-1).reshape(2, 2)
    np.testing.assert_allclose(dpo.response_log_probabilities(model, batch), expected, rtol=1e-5)
    weights = decode.prepare_weights(*nnx.split(model, nnx.Param))
    x = model.hidden(rows)
    np.testing.assert_allclose(decode.next_logits(model, weights, x), model.logits(x), rtol=1e-5, atol=1e-5)


def test_window_pattern_repeats_and_ends_with_a_full_layer():
    model = ModelConfig(depth=7, window=8, window_pattern="SSL")
    assert model.layer_windows == (8, 8, 0, 8, 8, 0, 0)
    assert ModelConfig(depth=4, window=8, window_pattern="SSSL").layer_windows == (8, 8, 8, 0)
    assert ModelConfig(depth=2, window=8, window_pattern="SSSL").layer_windows == (8, 0)
    assert ModelConfig(depth=1, window=8, window_pattern="S").layer_windows == (0,)


PROBLEMS = [
    ({"window_pattern": "SL"}, "model.window_pattern has no effect without model.window"),
    ({"window_pattern": "SL", "window": 8, "full_layers": [1]}, "full_layers and window_pattern both say"),
    ({"window_pattern": "SX", "window": 8}, "model.window_pattern = 'SX'"),
    ({"value_embeddings": [1, 9]}, "model.value_embeddings [1, 9]: name layers from 0 to 3"),
]


@pytest.mark.parametrize(("fields", "message"), PROBLEMS, ids=str)
def test_conflicts_are_refused(fields, message):
    _, problems = Config.check({"model": fields})
    assert len(problems) == 1
    assert message in problems[0]


def test_adapters_of_a_gate_that_relu2_lacks_are_refused():
    tree = {"model": {"mlp": "relu2"}, "lora": {"rank": 4}, "init": {"from_run": "runs/base"}}
    _, problems = Config.check(tree)
    assert ["use --lora.targets query key value out up down" in problem for problem in problems] == [True]
