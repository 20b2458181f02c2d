"""Causal attention in blocks of queries, with gradients written out: the fast path on CPU, and wherever no kernel fits.

Each block of queries meets only the keys it can see, so the masked half of the scores is never made; the backward
pass makes the weights again from the queries and keys rather than keeping [B, H, T, T] (as FlashAttention does,
arXiv:2205.14135). All products have the contracted axis last on the left, where XLA's CPU backend uses bfloat16
units (see matmul.py); for the two that do not, the scores are transposed, which is cheaper than the upcast.

Shapes as in transformer.py, and: N batch x key/value head, R query heads per key/value head, Q queries of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.model.ops.backend import precision

_BLOCK = 64  # smallest block of queries; more blocks skip more, fewer have larger products
_MOST_BLOCKS = 8
MASKED = -1e30  # not -inf: a row with nothing to see (padding) must give numbers, not NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def blockwise_attention(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, valid_BxT, segment_ids_BxT, dtype, window):
    """`ops.attention` (see there)."""
    return _forward(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, valid_BxT, segment_ids_BxT, dtype, window)[0]


def _blocks(length: int, window: int) -> list[tuple[slice, slice]]:
    """(queries, keys they may see) of each block."""
    size = -(-length // max(1, min(_MOST_BLOCKS, length // _BLOCK)))
    starts = range(0, length, size)
    first_key = lambda start: max(0, start - window + 1) if window else 0  # noqa: E731
    return [(slice(a, min(a + size, length)), slice(first_key(a), min(a + size, length))) for a in starts]


def _weights(q_NxRxQxK, k_NxSxK, queries: slice, keys: slice, window, valid, segments):
    """Softmax weights float32 [N, R * Q, S] of a block."""
    n, r, q, k = q_NxRxQxK.shape
    scores = _dot(q_NxRxQxK.reshape(n, r * q, k), k_NxSxK, 2, 2) * k**-0.5
    distance_QxS = jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)[None]
    seen = distance_QxS >= 0
    if window:
        seen &= distance_QxS < window
    seen_BxQxS = seen[None]
    if valid is not None:
        seen_BxQxS = seen_BxQxS & valid[:, None, keys].astype(bool)
    if segments is not None:
        seen_BxQxS = seen_BxQxS & (segments[:, queries, None] == segments[:, None, keys])
    b = seen_BxQxS.shape[0]
    scores = scores.reshape(b, n // b, r, q, -1)
    scores = jnp.where(seen_BxQxS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    if valid is not None:  # only then can a query see nothing
        weights = jnp.where(seen_BxQxS[:, None, None], weights, 0.0)
    return weights.reshape(n, r * q, -1)


def _forward(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, valid, segments, dtype, window):
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
    out_NxRxTxK = jnp.concatenate(outputs, axis=2)
    return _heads_last(out_NxRxTxK, b), (q_NxRxTxK, k_NxTxK, v_NxTxK, out_NxRxTxK, valid, segments)


def _backward(dtype, window, saved, g_BxTxHxK):
    q_NxRxTxK, k_NxTxK, v_NxTxK, out_NxRxTxK, valid, segments = saved
    n, r, t, width = q_NxRxTxK.shape
    b = g_BxTxHxK.shape[0]
    g_NxRxTxK = g_BxTxHxK.swapaxes(1, 2).reshape(n, r, t, width)
    # The softmax's gradient subtracts sum_s(weight * dweight), which is the output's product with its own gradient.
    delta_NxRxT = jnp.sum(g_NxRxTxK * out_NxRxTxK, axis=-1)
    g_NxRxTxK = jax.lax.optimization_barrier(g_NxRxTxK.astype(dtype))
    dq_blocks = []
    dk_NxTxK = dv_NxTxK = jnp.zeros(k_NxTxK.shape, jnp.float32)
    for queries, keys in _blocks(t, window):
        q_NxRxQxK, k_NxSxK = q_NxRxTxK[:, :, queries], k_NxTxK[:, keys]
        weights = _weights(q_NxRxQxK, k_NxSxK, queries, keys, window, valid, segments)
        q_NxPxK, g_NxPxK = q_NxRxQxK.reshape(n, -1, width), g_NxRxTxK[:, :, queries].reshape(n, -1, width)
        dweights = _dot(g_NxPxK, v_NxTxK[:, keys], 2, 2) - delta_NxRxT[:, :, queries].reshape(n, -1, 1)
        dscores = (weights * dweights * width**-0.5).astype(dtype)
        dq_blocks.append(_dot(dscores, k_NxSxK, 2, 1).reshape(n, r, -1, width))
        dk_NxTxK = dk_NxTxK.at[:, keys].add(_transposed_dot(dscores, q_NxPxK))
        dv_NxTxK = dv_NxTxK.at[:, keys].add(_transposed_dot(weights.astype(dtype), g_NxPxK))
    dq_NxRxTxK = jnp.concatenate(dq_blocks, axis=2)
    return _heads_last(dq_NxRxTxK, b), _heads_last(dk_NxTxK[:, None], b), _heads_last(dv_NxTxK[:, None], b), None, None


blockwise_attention.defvjp(_forward, _backward)


def _heads_first(x_BxTxHxK: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, H, T, K] in dtype, laid out as such in memory (the products run over whole heads)."""
    return jax.lax.optimization_barrier(x_BxTxHxK.swapaxes(1, 2).astype(dtype))


def _heads_last(x_NxRxTxK: jax.Array, batch: int) -> jax.Array:
    """[B, T, H, K]."""
    n, r, t, k = x_NxRxTxK.shape
    return x_NxRxTxK.reshape(batch, n * r // batch, t, k).swapaxes(1, 2)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> Any:
    """Batched over axis 0, contracting the named axes, in float32."""
    dims = (((a_axis,), (b_axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def _transposed_dot(a_NxPxS: jax.Array, b_NxPxK: jax.Array) -> Any:
    """aᵀ·b, [N, S, K]."""
    return _dot(jax.lax.optimization_barrier(a_NxPxS.swapaxes(1, 2)), b_NxPxK, 2, 1)
