"""Test that the matrix product with handwritten gradients equals the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.distributed.platform import Platform
from slm_jax.model.ops import matmul, naive_matmul
from slm_jax.model.ops.matmul import transposed_dot
from tests.helpers import BFLOAT16, FLOAT32, cosine, largest_difference


def value_and_grads(f, dtype):
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 7, 32), (32, 48), (3, 7, 48)))
    out, pullback = jax.vjp(lambda x, w: f(x, w, dtype), x, w)
    return out, pullback(g)


def test_float32_is_the_plain_product():
    assert largest_difference(value_and_grads(matmul, FLOAT32), value_and_grads(naive_matmul, FLOAT32)) == 0


def test_bfloat16_rounds_once_and_accumulates_in_float32():
    out, grads = value_and_grads(matmul, BFLOAT16)
    naive_out, naive_grads = value_and_grads(naive_matmul, BFLOAT16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((out, grads)))
    np.testing.assert_allclose(out, naive_out, atol=1e-5)  # float32 sums of 32 terms in another order
    assert cosine(grads, naive_grads) > 0.9999
    assert cosine(grads, value_and_grads(naive_matmul, FLOAT32)[1]) > 0.9999


def test_all_three_products_are_bfloat16():
    """In the traced program, before a backend compiles it, operands are bfloat16 and results float32."""
    x, w = jnp.zeros((8, 32)), jnp.zeros((32, 16))
    grads = jax.grad(lambda x, w: matmul(x, w, BFLOAT16).sum(), argnums=(0, 1))
    program = jax.jit(lambda x, w: (matmul(x, w, BFLOAT16), grads(x, w))).lower(x, w).as_text()
    dots = [line for line in program.splitlines() if "dot_general" in line]
    assert len(dots) >= 3
    assert all(line.count("xbf16>") == 2 and line.count("xf32>") == 1 for line in dots)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 48), (48, 32)])
def test_gradient_of_a_weight_transposes_the_smaller_operand_only(dtype, inputs, outputs):
    """On CPU, a transposed copy is computed with strided writes, together with the elementwise operations before it."""
    x, w = jnp.zeros((640, inputs)), jnp.zeros((inputs, outputs))
    grad = jax.grad(lambda x, w: jax.nn.silu(matmul(jnp.sin(x), w, dtype, Platform("cpu"))).sum(), argnums=1)
    program = jax.jit(grad).lower(x, w).compile().as_text()
    assert "[32,640]" in program
    assert "[48,640]" not in program


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 48), (48, 32)])
def test_transposed_product(dtype, inputs, outputs):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(640, width)), dtype) for width in (inputs, outputs))
    out = jax.jit(transposed_dot, static_argnums=2)(a, b, Platform("cpu"))
    expected = np.asarray(a, np.float64).T @ np.asarray(b, np.float64)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=2e-4)  # products of the rounded operands, summed in float32
