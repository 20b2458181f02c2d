"""A bound of the logits (`model.logit_softcap`), and the slope that gradients take through it."""

import jax
import jax.numpy as jnp


def cap_logits(logits: jax.Array, softcap: float) -> jax.Array:
    """Return softcap · tanh(logits / softcap) (Gemma 2, arXiv:2408.00118), in their dtype; the logits if it is 0."""
    return (softcap * jnp.tanh(logits.astype(jnp.float32) / softcap)).astype(logits.dtype) if softcap else logits


def times_slope(gradient: jax.Array, logits: jax.Array, softcap: float) -> jax.Array:
    """Return the gradient by logits before `cap_logits`, of the gradient by those after it; 0 for padding rows."""
    if not softcap:
        return gradient
    return gradient * (1 - (jnp.minimum(jnp.abs(logits.astype(jnp.float32)), softcap) / softcap) ** 2)
