"""Muon: Nesterov momentum, orthogonalized for each matrix of the blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from slm_jax.distributed.partitioning import Partitions, map_matrices, partition_of
from slm_jax.model import ops

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024), chosen for the steepest slope at 0: small
# singular values reach 1 in few iterations, at the price of a spread around 1 that does no harm.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def scale_by_muon(
    dtype: jnp.dtype, partitions: Partitions | None = None, beta: float = 0.95
) -> optax.GradientTransformation:
    """Return Muon (Jordan et al. 2024): Nesterov momentum, orthogonalized for each matrix [..., in, out].

    Updates are scaled to the root mean square of AdamW's, 0.2 · sqrt(max(in, out)) (arXiv:2502.16982), so that both
    optimizers share one learning rate and one weight decay. `optax.contrib.muon` computes the same; this one runs its
    products in `dtype` (bfloat16 halves its cost, and Newton-Schulz does not need more) and distributes the matrices
    over the devices.

    Args:
        dtype: Dtype of the products' operands.
        partitions: Declared partitions of the parameters; None: one device.
        beta: Decay of the momentum.
    """

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads: Any, momentum: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, grads)
        # Nesterov: look one step ahead by applying the gradient to the new momentum again.
        nesterov = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, grads)

        def scale(path: tuple[Any, ...], x_LxIxO: jax.Array) -> jax.Array:
            f = functools.partial(orthogonalize, dtype=dtype)
            if partitions is None:
                orthogonal = f(x_LxIxO)
            else:
                orthogonal = map_matrices(f, x_LxIxO, partition_of(path, x_LxIxO, partitions))
            # An orthogonal [in, out] has entries with a root mean square of 1 / sqrt(max(in, out)).
            return orthogonal * 0.2 * max(x_LxIxO.shape[-2:]) ** 0.5

        return jax.tree_util.tree_map_with_path(scale, nesterov), momentum

    return optax.GradientTransformation(init, update)


def orthogonalize(x_IxO: jax.Array, dtype: jnp.dtype, steps: int = 5) -> jax.Array:
    """Return about U·Vᵀ of the singular value decomposition; singular values end up between about 0.7 and 1.2.

    Quintic Newton-Schulz iteration (Jordan et al. 2024): x ← a x + (b x·xᵀ + c (x·xᵀ)²)·x applies the polynomial
    a s + b s³ + c s⁵ to the singular values s and leaves the singular vectors as they are.

    Args:
        x_IxO: A matrix, or a stack of them along leading axes.
        dtype: Dtype of the products' operands.
        steps: Iterations.

    Returns:
        float32 [..., I, O].
    """
    a, b, c = _NEWTON_SCHULZ
    # Of x·xᵀ and xᵀ·x take the smaller one. The norm bounds the largest singular value by 1, where the iteration
    # converges.
    is_tall = x_IxO.shape[-2] > x_IxO.shape[-1]
    x = jnp.swapaxes(x_IxO, -1, -2) if is_tall else x_IxO
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)

    def dot(left: jax.Array, right: jax.Array) -> jax.Array:
        return ops.einsum("...ij,...jk->...ik", left, right, dtype)

    def iterate(_: int, x: jax.Array) -> jax.Array:
        gram = ops.einsum("...ik,...jk->...ij", x, x, dtype)
        return a * x + dot(b * gram + c * dot(gram, gram), x)

    x = jax.lax.fori_loop(0, steps, iterate, x)  # compiles five times as fast as an unrolled loop
    return jnp.swapaxes(x, -1, -2) if is_tall else x
