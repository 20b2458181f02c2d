"""Causal attention with a local window, padding and document segments, and attention to a cache of keys and values.

`attention` runs one of four implementations (`choose_attention`); `naive_attention` defines what all of them compute.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G query heads per key/value head, K
channels of a head, N = B·G.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm_jax.distributed.partitioning import map_over_batch_and_heads
from slm_jax.distributed.platform import Platform
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
    """Return which keys each query attends to.

    Query t attends to key s if t - window < s <= t (s <= t without a window), s is not padding, and both are in the
    same segment.

    Args:
        length: Number of tokens, T.
        window: Tokens that a query attends to, itself included; 0: all earlier ones.
        valid_BxT: 0 for padding.
        segment_ids_BxT: Segment of each token.

    Returns:
        bool [B or 1, T, T].
    """
    index_T = jnp.arange(length)
    mask_BxTxT = _within(index_T[None, :, None] - index_T[None, None, :], window)
    if valid_BxT is not None:
        mask_BxTxT &= valid_BxT[:, None, :].astype(bool)
    if segment_ids_BxT is not None:
        mask_BxTxT &= segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :]
    return mask_BxTxT


def cache_mask(positions_BxT: jax.Array, cached_positions_BxS: jax.Array, window: int = 0) -> jax.Array:
    """Return which cached keys each query attends to, by position: bool [B, T, S].

    Args:
        positions_BxT: Position of each query in its sequence.
        cached_positions_BxS: Position of each cached key; -1: the column is empty or padding.
        window: As in `causal_mask`.
    """
    distance_BxTxS = positions_BxT[:, :, None] - cached_positions_BxS[:, None, :]
    return _within(distance_BxTxS, window) & (cached_positions_BxS >= 0)[:, None, :]


def _within(distance: jax.Array, window: int) -> jax.Array:
    """Return whether a key at this distance before the query is neither in the future nor outside the window."""
    is_past = distance >= 0
    return is_past & (distance < window) if window else is_past


def masked_attention(
    q_BxTxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array, mask_BxTxS: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Return softmax attention under a mask, with all scores at once.

    Query heads share the key/value heads in order, R consecutive ones each (arXiv:2305.13245). Products are in dtype,
    the softmax in float32.

    Args:
        q_BxTxHxK: Queries.
        k_BxSxGxK: Keys.
        v_BxSxGxK: Values.
        mask_BxTxS: Which keys each query attends to, bool; its first axis may be 1.
        dtype: Dtype of the products' operands.

    Returns:
        [B, T, H, K] in the dtype of the queries; zeros for a query that attends to nothing (padding).
    """
    b, t, h, k = q_BxTxHxK.shape
    g = k_BxSxGxK.shape[2]
    q_BxTxGxRxK = q_BxTxHxK.reshape(b, t, g, h // g, k)
    scores = einsum("btgrk,bsgk->bgrts", q_BxTxGxRxK, k_BxSxGxK, dtype)
    scores = jnp.where(mask_BxTxS[:, None, None], scores * k**-0.5, MASKED)
    weights = jnp.where(mask_BxTxS[:, None, None], jax.nn.softmax(scores, axis=-1), 0.0)
    out = einsum("bgrts,bsgk->btgrk", weights, v_BxSxGxK, dtype)
    return out.reshape(b, t, h, k).astype(q_BxTxHxK.dtype)


def cache_dtype(dtype: jnp.dtype, platform: Platform) -> jnp.dtype:
    """Return the dtype that a cache of keys and values is stored in.

    On CPU it is float32, holding values rounded to `dtype`: XLA would convert all of a bfloat16 cache to float32 at
    every step (batch 8, 256 tokens, 8 heads of 32: 1.1 ms per layer and step in place of 0.15).
    """
    return jnp.dtype(jnp.float32) if platform.name == "cpu" else dtype


def _round_to(x: jax.Array, dtype: jnp.dtype, storage_dtype: jnp.dtype) -> jax.Array:
    """Return x rounded to the values of dtype, stored in storage_dtype."""
    if storage_dtype == dtype or dtype == jnp.float32:
        return x.astype(storage_dtype)
    # Not a conversion to dtype and back, a pair that XLA may remove.
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x.astype(storage_dtype), info.nexp, info.nmant)


def write_cache(cache_NxSxK: jax.Array, new_BxTxGxK: jax.Array, column: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the cache with T new keys or values, rounded to dtype.

    Args:
        cache_NxSxK: Keys or values of one layer.
        new_BxTxGxK: New keys or values.
        column: int32 scalar, the first of T columns for all sequences (column + T <= S); or [B], one column for each
            sequence (T = 1).
        dtype: Compute dtype.
    """
    b, t, g, k = new_BxTxGxK.shape
    new_NxTxK = _round_to(new_BxTxGxK, dtype, cache_NxSxK.dtype).transpose(0, 2, 1, 3).reshape(b * g, t, k)
    if column.ndim:
        return cache_NxSxK.at[jnp.arange(b * g), jnp.repeat(column, g)].set(new_NxTxK[:, 0])
    return jax.lax.dynamic_update_slice(cache_NxSxK, new_NxTxK, (0, column, 0))


def cached_attention(
    q_BxTxHxK: jax.Array, k_NxSxK: jax.Array, v_NxSxK: jax.Array, mask_BxTxS: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Return what `masked_attention` computes, for keys and values in a cache.

    Args:
        q_BxTxHxK: Queries.
        k_NxSxK: Cached keys, in the dtype that `cache_dtype` gives.
        v_NxSxK: Cached values.
        mask_BxTxS: Which columns each query attends to.
        dtype: Compute dtype.

    Returns:
        [B, T, H, K] in the dtype of the queries.
    """
    b, t, h, k = q_BxTxHxK.shape
    n, s, _ = k_NxSxK.shape
    g = n // b
    storage_dtype = k_NxSxK.dtype
    # The R query heads of a key/value head, with their T queries each, become the rows of one product.
    q_NxQxK = q_BxTxHxK.reshape(b, t, g, h // g, k).transpose(0, 2, 3, 1, 4).reshape(n, -1, k)
    scores_NxQxS = einsum("nqk,nsk->nqs", _round_to(q_NxQxK, dtype, storage_dtype), k_NxSxK, storage_dtype)
    scores = scores_NxQxS.reshape(b, h, t, s)
    scores = jnp.where(mask_BxTxS[:, None], scores * k**-0.5, MASKED)
    weights = jnp.where(mask_BxTxS[:, None], jax.nn.softmax(scores, axis=-1), 0.0).reshape(n, -1, s)
    out_NxQxK = einsum("nqs,nsk->nqk", _round_to(weights, dtype, storage_dtype), v_NxSxK, storage_dtype)
    return out_NxQxK.reshape(b, h, t, k).swapaxes(1, 2).astype(q_BxTxHxK.dtype)


def naive_attention(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    dtype: jnp.dtype,
    window: int = 0,
    valid_BxT: jax.Array | None = None,
    segment_ids_BxT: jax.Array | None = None,
) -> jax.Array:
    """Return what `attention` computes, with the full mask and all scores at once."""
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
    platform: Platform | None = None,
) -> jax.Array:
    """Return causal self-attention over T tokens. Products are in dtype, the softmax in float32.

    Args:
        q_BxTxHxK: Queries, float32 or dtype.
        k_BxTxGxK: Keys, of the same dtype.
        v_BxTxGxK: Values, of the same dtype.
        dtype: Dtype of the products' operands.
        window: Tokens that a query attends to, itself included; 0: all earlier ones.
        valid_BxT: 0 for padding, which is never attended to.
        segment_ids_BxT: Attention stays inside a segment.
        implementation: The value of `model.attention`, see `choose_attention`.
        platform: The hardware that the program is compiled for; None: JAX's first device.

    Returns:
        [B, T, H, K] in the dtype of the queries. The outputs of padding queries are unspecified.

    Raises:
        UserError: If the named implementation cannot run.
    """
    _, length, _, width = q_BxTxHxK.shape
    name, _ = choose_attention(implementation, dtype, length, width, platform)
    arrays = (q_BxTxHxK, k_BxTxGxK, v_BxTxGxK)
    if name == "naive":
        return naive_attention(*arrays, dtype, window, valid_BxT, segment_ids_BxT)

    on_gpu = (platform or Platform.default()).name == "gpu"
    rest = (dtype, window, on_gpu) if name == "blocks" else (dtype, window)

    def local(q, k, v, valid, segments):
        return _FAST[name](q, k, v, valid, segments, *rest)

    return map_over_batch_and_heads(local, arrays, (valid_BxT, segment_ids_BxT))


_FAST: dict[str, Callable[..., jax.Array]] = {
    "blocks": blockwise_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}


def choose_attention(
    requested: str, dtype: jnp.dtype, length: int, width: int, platform: Platform | None = None
) -> tuple[str, str]:
    """Choose the implementation of attention.

    Args:
        requested: "auto", "naive", "blocks", "cudnn" or "splash". "auto" is cuDNN on NVIDIA GPUs and splash attention
            on TPUs, blocks where neither can run.
        dtype: Compute dtype.
        length: Tokens of a sequence, T.
        width: Channels of a head, K.
        platform: The hardware; None: JAX's first device.

    Returns:
        (implementation, reason): the reason why it is not the platform's kernel, or "".

    Raises:
        UserError: If an implementation that was requested by name cannot run.
    """
    if requested in ("blocks", "naive"):
        return requested, ""
    platform = platform or Platform.default()
    kernel = requested
    if requested == "auto":
        kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform.name, "blocks")
    problem = ""
    if kernel == "cudnn":
        problem = _cudnn_problem(dtype, length, width, platform)
    elif kernel == "splash":
        problem = _splash_problem(dtype, length, platform)
    if not problem:
        return kernel, ""
    if requested != "auto":
        raise UserError(f"model.attention {requested}: {problem}. Use --model.attention auto")
    return "blocks", f"{kernel}: {problem}"


def _cudnn_problem(dtype: jnp.dtype, length: int, width: int, platform: Platform) -> str:
    """Return why cuDNN's flash attention cannot run, or "". The conditions are those of `jax.nn`'s implementation."""
    capability = platform.capability
    if platform.name != "gpu" or not capability[:1].isdigit():  # AMD's are names such as gfx942
        return "there is no NVIDIA GPU"
    major = int(capability.partition(".")[0])
    if major < 8:
        return "it needs a GPU of compute capability 8.0 or higher"
    if dtype == jnp.float32:
        return "it computes in bfloat16 and float16 only"
    max_width = 256 if major >= 9 else 128
    if width % 8 or width > max_width:
        return f"heads are {width} wide, it needs a multiple of 8 up to {max_width}"
    # With a bias, which padding and segments become, cuDNN's backward pass needs an even number of tokens.
    return f"{length} tokens are an odd number" if length % 2 else ""


def _splash_problem(dtype: jnp.dtype, length: int, platform: Platform) -> str:
    """Return why splash attention cannot run, or ""."""
    if platform.name != "tpu":
        return "there is no TPU"
    if dtype == jnp.float32:  # its kernel requests no precision, so the TPU would round operands to bfloat16
        return "its products are not of float32 precision"
    if dtype == jnp.float16:
        return "TPUs have no float16 units"
    # A tile must be a multiple of the TPU's 128 lanes.
    return f"{length} tokens are not a multiple of 128" if length % 128 else ""


def describe_attention(
    requested: str, dtype: jnp.dtype, length: int, width: int, platform: Platform | None = None
) -> str:
    """Return one phrase on the implementation that runs, and why; arguments and errors as in `choose_attention`."""
    name, reason = choose_attention(requested, dtype, length, width, platform)
    text = {"blocks": "in blocks", "naive": "naive", "cudnn": "by cuDNN", "splash": "by splash attention"}[name]
    return f"attention {text}" + (f" ({reason})" if reason else "")
