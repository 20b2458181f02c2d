"""Execution of the blocks: what the backward pass keeps and recomputes, and whether the layers are a loop or unrolled.

The outputs of linear layers and of attention cost products, so that they are kept for the backward pass. What lies
between them is elementwise: norms, rotations, silu(gate) * up. Recomputed from what is kept while that is read anyway,
it costs hardly any time and no memory. Per token a block then keeps its input, queries, keys, values, the outputs of
attention and of its projection, gate and up: 6 D + 2 · inner width values with as many key/value heads as query heads,
in place of about twice as many, some of them in float32. GPUs keep 1 / rms of each head of queries and keys as well.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from slm_jax.model.precision import Policy

KEPT = "kept"
"""Name of the arrays that the backward pass keeps if elementwise work is recomputed."""

_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's primitive; it has no option to name its results
_MAX_UNROLLED = 24  # layers; compile time is proportional to them: about a second a layer on a GPU


def keep(x: jax.Array) -> jax.Array:
    """Return x, marked as an array that the backward pass keeps if elementwise work is recomputed."""
    return checkpoint_name(x, KEPT)


def _is_cudnn_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Return whether an operation is cuDNN's attention, whose output and softmax statistics its gradient reads."""
    return bool(primitive.name == _CUDNN_FORWARD)


# What the backward pass keeps, by the value of `model.remat`.
_POLICIES: dict[str, Any] = {
    # The outputs of linear layers and of attention are kept; norms, rotations and activations are recomputed.
    "elementwise": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(KEPT), _is_cudnn_attention
    ),
    # The outputs of linear layers are kept; attention is recomputed as well.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Each block's input is kept, the rest is recomputed.
    "full": None,
}


def choose_remat(requested: str, policy: Policy) -> str:
    """Return "none", "elementwise", "dots" or "full" for a value of `model.remat`.

    "auto" is "none" where activations are float32 on a CPU, whose elementwise work is slow, else "elementwise".
    """
    if requested != "auto":
        return requested
    return "none" if policy.platform.name == "cpu" and policy.activation == jnp.float32 else "elementwise"


def choose_scan(requested: bool | str, depth: int, policy: Policy) -> bool:
    """Return whether the layers are the body of a loop, for a value of `model.scan_layers`.

    "auto": on TPUs a loop, as their compiler takes about 20 s for each unrolled layer; on GPUs unrolled up to 24
    layers; on CPUs unrolled, which is faster there.
    """
    if requested != "auto":
        return bool(requested)
    return policy.platform.name == "tpu" or (policy.platform.name == "gpu" and depth > _MAX_UNROLLED)


def recompute(layer: Callable[..., Any], remat: str, is_scanned: bool) -> Callable[..., Any]:
    """Return a function that computes a layer and whose backward pass recomputes a part of it.

    Args:
        layer: Function of a block.
        remat: "none", "elementwise", "dots" or "full".
        is_scanned: Whether the function is the body of a loop, across which XLA cannot undo the recomputation; outside
            of one, barriers keep XLA from it.
    """
    if remat == "none":
        return layer
    return jax.checkpoint(layer, policy=_POLICIES[remat], prevent_cse=not is_scanned)
