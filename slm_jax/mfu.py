"""Model FLOPs utilisation: what share of the device's matrix speed the training step turns into model FLOPs."""

import time

import jax
import jax.numpy as jnp


def measured_roof(dtype: jnp.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of one device on a size x size matrix product in dtype (accumulated in float32): the best of what runs
    in about `seconds`."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()  # compile
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
