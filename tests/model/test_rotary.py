"""Test the rotary positions of each platform against complex multiplication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slm_jax.distributed.platform import Platform
from slm_jax.model.block import Attention
from slm_jax.model.precision import Policy
from slm_jax.model.rotary import rotary_frequencies, rotary_tables, rotate
from tests.helpers import FLOAT32, tiny_config

CPU, GPU = Platform("cpu"), Platform("gpu", "9.0")
CONFIG = tiny_config().model
POSITIONS = np.arange(7)[None] + np.array([[0], [30]])


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("platform", [CPU, GPU])
def test_pairs_of_channels_are_complex_numbers(platform):
    x = inputs(2, 7, 3, CONFIG.head_width)
    real, imaginary = np.split(np.asarray(x, np.float64), 2, axis=-1)
    angle = POSITIONS[..., None, None] * rotary_frequencies(CONFIG)
    turned = (real + 1j * imaginary) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    for positions in (POSITIONS, jnp.asarray(POSITIONS)):
        rotated = rotate(x, *rotary_tables(positions, CONFIG), platform)
        np.testing.assert_allclose(rotated, expected, atol=1e-5)


def test_queries_and_keys_are_those_of_other_platforms():
    """A GPU normalizes and rotates with other operations; values and gradients are the same."""
    x = inputs(2, 7, CONFIG.dim)
    tables = rotary_tables(POSITIONS, CONFIG)

    def value_and_grad(platform):
        attention = Attention(CONFIG, Policy(FLOAT32, FLOAT32, platform), nnx.Rngs(0))
        loss = lambda x: sum(jnp.sum(jnp.sin(each)) for each in attention.project(x, tables))  # noqa: E731
        return jax.value_and_grad(loss)(x)

    (value, grad), (expected, expected_grad) = value_and_grad(GPU), value_and_grad(CPU)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)
