"""A bound of the logits (`model.logit_softcap`), and the slope that gradients take through it."""

import jax
import jax.numpy as jnp


def cap_logits(logits: jax.Array, softcap: float) -> jax.Array:
    """Return softcap · tanh(logits / softcap) (Gemma 2, arXiv:2408.00118), in their dtype; the logits if it is 0."""
    return (softcap * jnp.tanh(logits.astype(jnp.float32) / softcap)).astype(logits.dtype) if softcap else logits


def times_slope(gradient: jax.Array, logits: jax.Array, softcap: float) -> jax.Array:
    """Return the gradient with respect to the logits before `cap_logits`, by the chain rule.

    Args:
        gradient: Gradient with respect to the capped logits.
        logits: The capped logits. Beyond the cap are only those of the head's padding rows, whose slope is 0.
        softcap: The cap; 0: there is none, and the gradient is returned.
    """
    if not softcap:
        return gradient
    return gradient * (1 - (jnp.minimum(jnp.abs(logits.astype(jnp.float32)), softcap) / softcap) ** 2)
