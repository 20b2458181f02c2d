"""Model FLOPs utilisation: what share of the device's matrix speed the training step turns into model FLOPs."""

import time

import jax
import jax.numpy as jnp

from slm_jax import ops


def measured_roof(dtype: jnp.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of one device on square matrix products in dtype, accumulated in float32: the best of about `seconds`."""
    # An accelerator needs a large product, and many in one call, to show its speed and not the cost of a call.
    size, products = (1024, 1) if jax.default_backend() == "cpu" else (8192, 8)
    a = jnp.ones((size, size), dtype)

    @jax.jit
    def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
        for _ in range(products):
            x = ops.einsum("ij,jk->ik", x, y, dtype).astype(dtype)
        return x

    multiply(a, a).block_until_ready()  # compile
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 * products / best
