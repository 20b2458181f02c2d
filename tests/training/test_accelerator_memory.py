"""The memory of the compiled training step on accelerators, by their compilers; no chip is needed."""

import importlib.util

import pytest

from slm_jax.config.schema import Config
from slm_jax.planning.program import compile_program
from slm_jax.planning.targets import TARGETS, describe_devices

ROWS, VOCAB = 8, 32_768


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "plugin", "limit"),
    [("h100", "jax_cuda12_plugin", 35), ("v5e", "libtpu", 50)],
)
def test_temporary_bytes_of_a_token(target, plugin, limit):
    """At most so many bytes per token, layer and channel.

    The bfloat16 activations that the backward pass of gpu_125m keeps take 23, the loss 6, weights and gradients 4.
    """
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"needs {plugin}")
    config = Config.load("gpu_125m", **{"train.batch_size": ROWS})
    program = compile_program(config, VOCAB, TARGETS[target], describe_devices(TARGETS[target], 1), ROWS)
    numbers = ROWS * config.train.sequence_length * config.model.depth * config.model.dim
    assert program.temp_bytes / numbers <= limit
