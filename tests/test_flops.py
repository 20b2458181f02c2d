"""FLOPs by formula against the parameters there are and against a count over all pairs."""

import jax
import pytest
from flax import nnx

from slm_jax import flops
from slm_jax.config import ModelConfig
from tests.helpers import tiny_model


@pytest.mark.parametrize("fields", [{}, {"kv_heads": 1}, {"tie_weights": False, "depth": 3}])
def test_matmul_parameters_are_those_of_the_model(fields):
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
