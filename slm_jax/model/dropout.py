"""Dropout whose masks depend on an example's key and on nothing else.

Shapes: B batch, T tokens, D dim.
"""

import jax
import jax.numpy as jnp


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """Return the dropout keys [B] of a batch's examples, each derived from `key` and the example's index alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def site_keys(keys_B: jax.Array, site: jax.Array | int) -> jax.Array:
    """Return the examples' keys [B] for one place where dropout is applied, numbered by `site`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, site)


def drop(x_BxTxD: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Return x after dropout: zeroed with probability `rate`, scaled by 1 / (1 - rate) elsewhere; x without keys.

    The mask of an example is a function of its own key and of the position in it, so that it depends neither on the
    examples computed together with it, nor on the device that computes it, nor on the padding at its end.
    """
    if keys_B is None or rate == 0.0:
        return x_BxTxD
    kept_BxTxD = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x_BxTxD.shape[1:]))(keys_B)
    # In float32: 1 - rate is a fifth of a percent off in bfloat16, at every sub-layer.
    scaled_BxTxD = (x_BxTxD.astype(jnp.float32) / (1.0 - rate)).astype(x_BxTxD.dtype)
    return jnp.where(kept_BxTxD, scaled_BxTxD, 0.0)
