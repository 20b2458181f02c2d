"""Causal attention with a local window, padding and document segments; and attention to a cache of keys and values."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm_jax.distributed.partitioning import over_rows_and_heads
from slm_jax.model.ops.attention_blocks import MASKED, blockwise_attention
from slm_jax.model.ops.attention_kernels import cudnn_attention, splash_attention
from slm_jax.model.ops.matmul import einsum
from slm_jax.utils.errors import UserError


def causal_mask(
    length: int,
    window: int = 0,
    valid_BxT: jax.Array | None = None,
    segment_ids_BxT: jax.Array | None = None,
) -> jax.Array:
    """bool [B or 1, T, T]: key s is seen from t when t - window < s <= t (window 0: s <= t), s is no padding and
    both are in one segment."""
    index_T = jnp.arange(length)
    mask_BxTxT = _within(index_T[None, :, None] - index_T[None, None, :], window)
    if valid_BxT is not None:
        mask_BxTxT &= valid_BxT[:, None, :].astype(bool)
    if segment_ids_BxT is not None:
        mask_BxTxT &= segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :]
    return mask_BxTxT


def cache_mask(positions_BxT: jax.Array, cached_positions_BxS: jax.Array, window: int = 0) -> jax.Array:
    """bool [B, T, S]: which cached keys a query sees, by position; a cached position of -1 is an empty slot."""
    distance_BxTxS = positions_BxT[:, :, None] - cached_positions_BxS[:, None, :]
    return _within(distance_BxTxS, window) & (cached_positions_BxS >= 0)[:, None, :]


def _within(distance: jax.Array, window: int) -> jax.Array:
    seen = distance >= 0
    return seen & (distance < window) if window else seen


def masked_attention(
    q_BxTxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array, mask_BxTxS: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Softmax attention float32 [B, T, H, K] under a mask [B or 1, T, S].

    The H query heads share the G key/value heads in order (H / G each). Products in dtype, softmax in float32. A query
    that sees nothing (padding) gets zeros.
    """
    b, t, h, k = q_BxTxHxK.shape
    g = k_BxSxGxK.shape[2]
    q_BxTxGxRxK = q_BxTxHxK.reshape(b, t, g, h // g, k)
    scores = einsum("btgrk,bsgk->bgrts", q_BxTxGxRxK, k_BxSxGxK, dtype)
    scores = jnp.where(mask_BxTxS[:, None, None], scores * k**-0.5, MASKED)
    weights = jnp.where(mask_BxTxS[:, None, None], jax.nn.softmax(scores, axis=-1), 0.0)
    out = einsum("bgrts,bsgk->btgrk", weights, v_BxSxGxK, dtype)
    return out.reshape(b, t, h, k)


def cache_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What a cache of keys and values is kept in: on CPU float32 that holds values of dtype, for XLA would convert a
    bfloat16 cache whole at every step (batch 8, 256 tokens, 8 heads of 32: 1.1 ms a layer and step against 0.15)."""
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else dtype


def _round_to(x: jax.Array, dtype: jnp.dtype, kept: jnp.dtype) -> jax.Array:
    """x rounded to dtype, kept in another one."""
    if kept == dtype or dtype == jnp.float32:
        return x.astype(kept)
    info = jnp.finfo(dtype)  # reduce_precision: XLA may drop a pair of conversions
    return jax.lax.reduce_precision(x.astype(kept), info.nexp, info.nmant)


def write_cache(cache_NxSxK: jax.Array, new_BxTxGxK: jax.Array, column: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The cache (N = B·G) with T new keys or values, rounded to dtype, from a column on (column + T <= S).

    column: int32 scalar, or [B], where each row has a column of its own for its one new token (T = 1).
    """
    b, t, g, k = new_BxTxGxK.shape
    new_NxTxK = _round_to(new_BxTxGxK, dtype, cache_NxSxK.dtype).transpose(0, 2, 1, 3).reshape(b * g, t, k)
    if column.ndim:
        return cache_NxSxK.at[jnp.arange(b * g), jnp.repeat(column, g)].set(new_NxTxK[:, 0])
    return jax.lax.dynamic_update_slice(cache_NxSxK, new_NxTxK, (0, column, 0))


def cached_attention(
    q_BxTxHxK: jax.Array, k_NxSxK: jax.Array, v_NxSxK: jax.Array, mask_BxTxS: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """What `masked_attention` computes, of keys and values in a cache [B·G, S, K] (see `cache_dtype` for its dtype)."""
    b, t, h, k = q_BxTxHxK.shape
    n, s, _ = k_NxSxK.shape
    g, kept = n // b, k_NxSxK.dtype
    q_NxQxK = q_BxTxHxK.reshape(b, t, g, h // g, k).transpose(0, 2, 3, 1, 4).reshape(n, -1, k)
    scores = einsum("nqk,nsk->nqs", _round_to(q_NxQxK, dtype, kept), k_NxSxK, kept).reshape(b, h, t, s)
    scores = jnp.where(mask_BxTxS[:, None], scores * k**-0.5, MASKED)
    weights = jnp.where(mask_BxTxS[:, None], jax.nn.softmax(scores, axis=-1), 0.0).reshape(n, -1, s)
    out_NxQxK = einsum("nqs,nsk->nqk", _round_to(weights, dtype, kept), v_NxSxK, kept)
    return out_NxQxK.reshape(b, h, t, k).swapaxes(1, 2)


def naive_attention(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    dtype: jnp.dtype,
    window: int = 0,
    valid_BxT: jax.Array | None = None,
    segment_ids_BxT: jax.Array | None = None,
) -> jax.Array:
    """What `attention` computes, with the whole mask and all scores at once."""
    mask = causal_mask(q_BxTxHxK.shape[1], window, valid_BxT, segment_ids_BxT)
    return masked_attention(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, mask, dtype)


def attention(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    dtype: jnp.dtype,
    window: int = 0,
    valid_BxT: jax.Array | None = None,
    segment_ids_BxT: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Causal self-attention float32 [B, T, H, K] of float32 queries, keys and values of the same T tokens.

    window: tokens seen, the query's own included (0: all). valid: 0 for padding, never attended to. segment_ids:
    attention stays inside a segment. Products in dtype, softmax in float32. implementation: as `choose_attention`.
    """
    name, _ = choose_attention(implementation, dtype, q_BxTxHxK.shape[1], q_BxTxHxK.shape[3])
    arrays = (q_BxTxHxK, k_BxTxGxK, v_BxTxGxK)
    if name == "naive":
        return naive_attention(*arrays, dtype, window, valid_BxT, segment_ids_BxT)

    def local(q, k, v, valid, segments):
        return _FAST[name](q, k, v, valid, segments, dtype, window)

    return over_rows_and_heads(local, arrays, (valid_BxT, segment_ids_BxT))


_FAST: dict[str, Callable[..., jax.Array]] = {
    "blocks": blockwise_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}


def choose_attention(asked: str, dtype: jnp.dtype, length: int, width: int) -> tuple[str, str]:
    """(which implementation runs, why it is not the backend's kernel or ""), for heads of a width.

    auto: cuDNN on NVIDIA GPUs, splash on TPUs, blocks where neither can run. Raises UserError if the one that was
    asked for by name cannot run.
    """
    if asked in ("blocks", "naive"):
        return asked, ""
    kernel = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "blocks") if asked == "auto" else asked
    problem = {"cudnn": _cudnn_problem, "splash": _splash_problem}.get(kernel, lambda *_: "")(dtype, length, width)
    if problem and asked != "auto":
        raise UserError(f"model.attention {asked}: {problem}. Use --model.attention auto")
    return ("blocks", f"{kernel}: {problem}") if problem else (kernel, "")


def _cudnn_problem(dtype: jnp.dtype, length: int, width: int) -> str:
    if jax.default_backend() != "gpu" or not hasattr(jax.devices()[0], "compute_capability"):
        return "there is no NVIDIA GPU"
    major = int(str(jax.devices()[0].compute_capability).partition(".")[0])
    if major < 8:
        return "it needs a GPU of compute capability 8.0 or more"
    if dtype != jnp.bfloat16:
        return "it computes in bfloat16 only"
    widest = 256 if major >= 9 else 128
    if width % 8 or width > widest:
        return f"heads are {width} wide, it needs a multiple of 8 up to {widest}"
    return f"{length} tokens are an odd number" if length % 2 else ""


def _splash_problem(dtype: jnp.dtype, length: int, width: int) -> str:
    if jax.default_backend() != "tpu":
        return "there is no TPU"
    return f"{length} tokens are not a multiple of 128" if length % 128 else ""


def describe_attention(asked: str, dtype: jnp.dtype, length: int, width: int) -> str:
    """One phrase for the start of a run. Raises UserError as `choose_attention` does."""
    name, why = choose_attention(asked, dtype, length, width)
    words = {"blocks": "in blocks", "naive": "naive", "cudnn": "by cuDNN", "splash": "by splash"}[name]
    return f"attention {words}" + (f" ({why})" if why else "")
