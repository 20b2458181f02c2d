"""Causal attention in blocks of queries with handwritten gradients: for CPU, and where no kernel of a vendor can run.

Each block of queries is multiplied only with the keys that it may attend to, so that most of the masked half of the
scores is never computed. The backward pass recomputes the weights from queries and keys and does not keep
[B, H, T, T], as in FlashAttention (arXiv:2205.14135).

With weights w = softmax(q·kᵀ / √K), output o = w·v and the output's gradient g, the gradients are (FlashAttention,
appendix B.2)

    dv = wᵀ·g,   dw = g·vᵀ,   ds = w ∘ (dw - δ) / √K,   dq = ds·k,   dk = dsᵀ·q,   δ = sum(w ∘ dw) = sum(g ∘ o)

where δ is one number per query and head: the sum over keys equals a sum over channels, which needs no weights.

All products have the contracted axis last on the left, where XLA's CPU backend uses bfloat16 units (see matmul.py).
For dv and dk the weights and scores are transposed explicitly, which is cheaper than an upcast.

Shapes: B batch, T tokens, S keys of a block, Q queries of a block, H query heads, G key/value heads, K channels of a
head, N = B·G, R = H / G query heads per key/value head, P = R·Q.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.model.precision import precision
from slm_jax.model.recomputation import keep

_MIN_BLOCK = 64  # queries; more blocks skip more of the masked scores, fewer blocks have larger products
_MAX_BLOCKS = 8
MASKED = -1e30
"""Score of a masked key; not -inf, which gives NaN where a query attends to nothing (padding)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def blockwise_attention(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, valid_BxT, segment_ids_BxT, dtype, window, on_gpu=False):
    """Return `ops.attention` in blocks of queries; arguments as there."""
    return _forward(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, valid_BxT, segment_ids_BxT, dtype, window, on_gpu)[0]


def _blocks(length: int, window: int) -> list[tuple[slice, slice]]:
    """Return (queries, keys that they may attend to) of each block."""
    count = max(1, min(_MAX_BLOCKS, length // _MIN_BLOCK))
    size = -(-length // count)
    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        first_key = max(0, start - window + 1) if window else 0
        blocks.append((slice(start, stop), slice(first_key, stop)))
    return blocks


def _weights(q_NxRxQxK, k_NxSxK, queries: slice, keys: slice, window, valid, segments):
    """Return the softmax weights of a block, float32 [N, R * Q, S]."""
    n, r, q, k = q_NxRxQxK.shape
    scores = _dot(q_NxRxQxK.reshape(n, r * q, k), k_NxSxK, 2, 2) * k**-0.5
    distance_QxS = jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)[None]
    mask_QxS = distance_QxS >= 0
    if window:
        mask_QxS &= distance_QxS < window
    mask_BxQxS = mask_QxS[None]
    if valid is not None:
        mask_BxQxS = mask_BxQxS & valid[:, None, keys].astype(bool)
    if segments is not None:
        mask_BxQxS = mask_BxQxS & (segments[:, queries, None] == segments[:, None, keys])
    b = mask_BxQxS.shape[0]  # 1 without padding and segments: the same mask for all sequences
    scores = scores.reshape(b, n // b, r, q, -1)
    scores = jnp.where(mask_BxQxS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    if valid is not None:  # only with padding can a query attend to nothing; its weights would be uniform
        weights = jnp.where(mask_BxQxS[:, None, None], weights, 0.0)
    return weights.reshape(n, r * q, -1)


def _forward(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, valid, segments, dtype, window, on_gpu):
    del on_gpu  # concerns the gradients
    b, t, h, width = q_BxTxHxK.shape
    g = k_BxTxGxK.shape[2]
    q_NxRxTxK = _heads_first(q_BxTxHxK, dtype).reshape(b * g, h // g, t, width)
    k_NxTxK = _heads_first(k_BxTxGxK, dtype).reshape(b * g, t, width)
    v_NxTxK = _heads_first(v_BxTxGxK, dtype).reshape(b * g, t, width)
    outputs = []
    for queries, keys in _blocks(t, window):
        weights = _weights(q_NxRxTxK[:, :, queries], k_NxTxK[:, keys], queries, keys, window, valid, segments)
        out = _dot(weights.astype(dtype), v_NxTxK[:, keys], 2, 1)
        outputs.append(out.reshape(b * g, h // g, -1, width))
    out_NxRxTxK = keep(jnp.concatenate(outputs, axis=2).astype(q_BxTxHxK.dtype))
    return _heads_last(out_NxRxTxK, b), (q_NxRxTxK, k_NxTxK, v_NxTxK, out_NxRxTxK, valid, segments)


def _backward(dtype, window, on_gpu, residuals, g_BxTxHxK):
    q_NxRxTxK, k_NxTxK, v_NxTxK, out_NxRxTxK, valid, segments = residuals
    n, r, t, width = q_NxRxTxK.shape
    b = g_BxTxHxK.shape[0]
    g_NxRxTxK = g_BxTxHxK.swapaxes(1, 2).reshape(n, r, t, width)
    in_dtype = g_BxTxHxK.dtype  # that of queries, keys and values too
    # δ, see the top of the file. Over three axes, since the sum over four takes XLA's CPU backend ten times as long.
    products = (g_NxRxTxK * out_NxRxTxK).reshape(n * r, t, width)
    delta_NxRxT = jnp.sum(products, axis=-1, dtype=jnp.float32).reshape(n, r, t)
    g_NxRxTxK = jax.lax.optimization_barrier(g_NxRxTxK.astype(dtype))
    dq_blocks = []
    dk_NxTxK = dv_NxTxK = jnp.zeros(k_NxTxK.shape, jnp.float32)
    for queries, keys in _blocks(t, window):
        q_NxRxQxK = q_NxRxTxK[:, :, queries]
        k_NxSxK = k_NxTxK[:, keys]
        weights = _weights(q_NxRxQxK, k_NxSxK, queries, keys, window, valid, segments)
        q_NxPxK = q_NxRxQxK.reshape(n, -1, width)
        g_NxPxK = g_NxRxTxK[:, :, queries].reshape(n, -1, width)
        dweights = _dot(g_NxPxK, v_NxTxK[:, keys], 2, 2) - delta_NxRxT[:, :, queries].reshape(n, -1, 1)
        dscores = (weights * dweights * width**-0.5).astype(dtype)
        dq_blocks.append(_dot(dscores, k_NxSxK, 2, 1).reshape(n, r, -1, width))
        dk_NxTxK = _add_at(dk_NxTxK, keys, _transposed_dot(dscores, q_NxPxK, on_gpu))
        dv_NxTxK = _add_at(dv_NxTxK, keys, _transposed_dot(weights.astype(dtype), g_NxPxK, on_gpu))
    gradients = (jnp.concatenate(dq_blocks, axis=2), dk_NxTxK[:, None], dv_NxTxK[:, None])
    return *(_heads_last(x.astype(in_dtype), b) for x in gradients), None, None


blockwise_attention.defvjp(_forward, _backward)


def _add_at(total_NxTxK: jax.Array, keys: slice, x_NxSxK: jax.Array) -> jax.Array:
    """Return the total with x added to some keys.

    JAX writes an update of all keys as a scatter with an array of no indices, a constant. XLA of jax 0.11.2 crashes if
    `shard_map` passes such an empty constant.
    """
    if x_NxSxK.shape == total_NxTxK.shape:
        return total_NxTxK + x_NxSxK
    return total_NxTxK.at[:, keys].add(x_NxSxK)


def _heads_first(x_BxTxHxK: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return x as [B, H, T, K] in dtype, contiguous in memory: the products run over all tokens of a head."""
    return jax.lax.optimization_barrier(x_BxTxHxK.swapaxes(1, 2).astype(dtype))


def _heads_last(x_NxRxTxK: jax.Array, batch: int) -> jax.Array:
    """Return x as [B, T, H, K]."""
    n, r, t, k = x_NxRxTxK.shape
    return x_NxRxTxK.reshape(batch, n * r // batch, t, k).swapaxes(1, 2)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> Any:
    """Return the product over the named axes, batched over axis 0, accumulated in float32."""
    dims = (((a_axis,), (b_axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def _transposed_dot(a_NxPxS: jax.Array, b_NxPxK: jax.Array, on_gpu: bool) -> Any:
    """Return aᵀ·b, [N, S, K].

    On CPU, a barrier keeps XLA from folding the transpose away: the product is on the bfloat16 units. On GPUs, one
    keeps it from merging the product with an addition, for which it would copy keys out of the total and back.
    """
    if on_gpu:
        return jax.lax.optimization_barrier(_dot(a_NxPxS, b_NxPxK, 1, 1))
    return _dot(jax.lax.optimization_barrier(a_NxPxS.swapaxes(1, 2)), b_NxPxK, 2, 1)
