"""The matrix product of every linear layer, with its forward and both backward products on the bfloat16 units.

The gradients are written by hand, because those that JAX derives for a bf16 x bf16 -> f32 product multiply in float32
and round the gradient of a float32 weight to bfloat16. On CPU there is a second reason: XLA uses the bfloat16 units
only if the contracted axis is the last one of the left operand. That holds for the forward product and for the gradient
of the input; the gradient of the weight, xᵀ·g, would be upcast to float32. Materializing xᵀ (behind an optimization
barrier, since XLA would fold the transpose into the product) and giving the product a batch axis of size 1 puts it on
the bfloat16 units too: 1.5 to 2 times as fast as the plain form on AVX512-BF16. Of x and g the narrower one is
transposed, also in float32, where XLA would choose g and compute it with strided writes.

Shapes: N rows of x (all leading axes flattened), I inputs, O outputs.
"""

import functools

import jax
import jax.numpy as jnp

from slm_jax.distributed.platform import Platform
from slm_jax.model.precision import precision


def einsum(
    subscripts: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype, out_dtype: jnp.dtype = jnp.dtype("float32")
) -> jax.Array:
    """Return `jnp.einsum` of two arrays that are rounded to dtype first, accumulated in float32.

    Returns:
        An array in out_dtype.
    """
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(subscripts, a, b, precision=precision(dtype), preferred_element_type=out_dtype)


def row_products(
    x: jax.Array, w_VxD: jax.Array, dtype: jnp.dtype, out_dtype: jnp.dtype = jnp.dtype("float32")
) -> jax.Array:
    """Return the products of rows x [..., D] with the rows of w, [..., V] in out_dtype; operands as in `einsum`.

    A product of two axes: XLA of jax 0.7.2 has none of more axes in bfloat16 on CPUs.
    """
    y_NxV = einsum("nd,vd->nv", x.reshape(-1, x.shape[-1]), w_VxD, dtype, out_dtype)
    return y_NxV.reshape(*x.shape[:-1], -1)


def naive_matmul(x: jax.Array, w_IxO: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return what `matmul` computes; the gradients are those that JAX derives."""
    return einsum("...i,io->...o", x, w_IxO, dtype).astype(x.dtype)


def matmul(x: jax.Array, w_IxO: jax.Array, dtype: jnp.dtype, platform: Platform | None = None) -> jax.Array:
    """Return x·w with the operands rounded to dtype, accumulated in float32.

    Args:
        x: float32 or dtype [..., I].
        w_IxO: float32 or dtype weight.
        dtype: float32, bfloat16 or float16.
        platform: The hardware that the gradients are written for; None: JAX's first device.

    Returns:
        [..., O] in the dtype of x. Gradients have the dtypes of x and w.
    """
    platform = platform or Platform.default()
    if dtype == jnp.float32 and platform.name != "cpu":
        return naive_matmul(x, w_IxO, dtype)
    y_NxO = _matmul(x.reshape(-1, x.shape[-1]), w_IxO, dtype, w_IxO.dtype, platform)
    return y_NxO.reshape(*x.shape[:-1], w_IxO.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul(
    x_NxI: jax.Array, w_IxO: jax.Array, dtype: jnp.dtype, weight_dtype: jnp.dtype, platform: Platform
) -> jax.Array:
    return _forward(x_NxI, w_IxO, dtype, weight_dtype, platform)[0]


def _forward(x_NxI, w_IxO, dtype, weight_dtype, platform):
    del weight_dtype, platform
    out_dtype = x_NxI.dtype
    x_NxI, w_IxO = x_NxI.astype(dtype), w_IxO.astype(dtype)
    return _dot(x_NxI, w_IxO, 1, 0, out_dtype), (x_NxI, w_IxO)


def _backward(dtype, weight_dtype, platform, residuals, g_NxO):
    x_NxI, w_IxO = residuals
    in_dtype = g_NxO.dtype  # y and g have the dtype that x had
    g_NxO = g_NxO.astype(dtype)
    # dx = g·wᵀ contracts the last axis of both, dw = xᵀ·g the first axis of both.
    return _dot(g_NxO, w_IxO, 1, 1, in_dtype), transposed_dot(x_NxI, g_NxO, platform, weight_dtype)


_matmul.defvjp(_forward, _backward)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, out_dtype: jnp.dtype) -> jax.Array:
    """Return the product of two matrices over the named axes."""
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=out_dtype)


def transposed_dot(
    a_NxI: jax.Array, b_NxO: jax.Array, platform: Platform, out_dtype: jnp.dtype = jnp.dtype("float32")
) -> jax.Array:
    """Return aᵀ·b in out_dtype [I, O], accumulated in float32 on the bfloat16 units (see the top of the file).

    Args:
        a_NxI: Left operand, float32 or bfloat16.
        b_NxO: Right operand, of the same dtype.
        platform: The hardware that the product runs on.
        out_dtype: Dtype of the result.
    """
    if platform.name != "cpu":
        return einsum("ni,no->io", a_NxI, b_NxO, a_NxI.dtype, out_dtype)
    if a_NxI.shape[1] > b_NxO.shape[1]:  # copy the smaller operand; the barrier keeps the product's own layout
        return jax.lax.optimization_barrier(transposed_dot(b_NxO, a_NxI, platform, out_dtype)).T
    if a_NxI.dtype == jnp.float32:
        # Without the barriers, XLA transposes b instead and computes what made it, such as the gradient of a SwiGLU,
        # with strided writes: a sixth of a step.
        a_IxN, b_NxO = jax.lax.optimization_barrier((a_NxI.T, b_NxO))
        return _dot(a_IxN, b_NxO, 1, 0, out_dtype)
    a_1xIxN = jax.lax.optimization_barrier(a_NxI.T)[None]
    dims = (((2,), (1,)), ((0,), (0,)))
    return jax.lax.dot_general(a_1xIxN, b_NxO[None], dims, preferred_element_type=jnp.float32)[0].astype(out_dtype)
