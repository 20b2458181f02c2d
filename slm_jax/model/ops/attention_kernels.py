"""Causal attention by accelerator kernels: cuDNN on NVIDIA GPUs, Pallas' splash attention on TPUs.

Both compute `ops.attention` for every real query. Their results for padding queries may differ, which is harmless: no
real query attends to padding, and padding has no labels.

Shapes: B batch, T tokens, H query heads, G key/value heads, K channels of a head.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.model.recomputation import KEPT

_SPLASH_TILE = 1024  # queries and keys of a tile; large tiles leave fewer partial sums of the queries' gradient
_LANES = 128  # of a TPU's vector units; tiles are multiples of it


def cudnn_attention(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    valid_BxT: jax.Array | None,
    segment_ids_BxT: jax.Array | None,
    dtype: jnp.dtype,
    window: int,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Return `ops.attention` by cuDNN's flash attention.

    Causality and window are options of the kernel. Padding and segments become a mask [B, 1, T, T], which JAX adds to
    the scores as a bias.

    Args:
        q_BxTxHxK: Queries; the other arguments up to `window` as in `ops.attention`.
        k_BxTxGxK: Keys.
        v_BxTxGxK: Values.
        valid_BxT: 0 for padding.
        segment_ids_BxT: Segment of each token.
        dtype: bfloat16 or float16.
        window: Tokens that a query attends to, itself included; 0: all earlier ones.
        implementation: "cudnn" is requested by name, because JAX would choose XLA's; "xla" is for tests without a GPU.

    Returns:
        [B, T, H, K] in the dtype of the queries.
    """
    mask_Bx1xTxT = None
    if valid_BxT is not None:
        # Padding attends to itself: the softmax over nothing is NaN.
        itself_TxT = jnp.eye(q_BxTxHxK.shape[1], dtype=bool)
        mask_Bx1xTxT = valid_BxT.astype(bool)[:, None, None, :] | itself_TxT
    if segment_ids_BxT is not None:
        same_Bx1xTxT = (segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :])[:, None]
        mask_Bx1xTxT = same_Bx1xTxT if mask_Bx1xTxT is None else same_Bx1xTxT & mask_Bx1xTxT
    out = jax.nn.dot_product_attention(
        q_BxTxHxK.astype(dtype),
        k_BxTxGxK.astype(dtype),
        v_BxTxGxK.astype(dtype),
        mask=mask_Bx1xTxT,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,  # (keys before the query, keys after it)
        implementation=implementation,
    )
    return out.astype(q_BxTxHxK.dtype)


def splash_attention(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    valid_BxT: jax.Array | None,
    segment_ids_BxT: jax.Array | None,
    dtype: jnp.dtype,
    window: int,
    interpret: bool = False,
) -> jax.Array:
    """Return `ops.attention` by splash attention, which skips the tiles that the causal window leaves empty.

    Padding becomes a segment of its own. T must be a multiple of 128.

    Args:
        q_BxTxHxK: Queries; the other arguments up to `window` as in `ops.attention`.
        k_BxTxGxK: Keys.
        v_BxTxGxK: Values.
        valid_BxT: 0 for padding.
        segment_ids_BxT: Segment of each token.
        dtype: Dtype of the products' operands.
        window: Tokens that a query attends to, itself included; 0: all earlier ones.
        interpret: Run the kernel's program on any backend, slowly.

    Returns:
        [B, T, H, K] in the dtype of the queries.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    _, length, _, width = q_BxTxHxK.shape
    segments_BxT = segment_ids_BxT
    if valid_BxT is not None:
        segments_BxT = jnp.where(valid_BxT.astype(bool), 0 if segments_BxT is None else segments_BxT, -1)

    # The kernel does not scale the scores, so the queries are scaled.
    scaled_q_BxTxHxK = q_BxTxHxK.astype(jnp.float32) * width**-0.5
    arrays = [x.astype(dtype) for x in (scaled_q_BxTxHxK, k_BxTxGxK, v_BxTxGxK)]
    q_BxHxTxK, k_BxGxTxK, v_BxGxTxK = (x.swapaxes(1, 2) for x in arrays)
    kernel = _splash_kernel(q_BxHxTxK.shape[1], length, window, interpret)
    segments = None if segments_BxT is None else splash.SegmentIds(segments_BxT, segments_BxT)
    out_BxHxTxK = jax.vmap(kernel)(q_BxHxTxK, k_BxGxTxK, v_BxGxTxK, segments)
    return out_BxHxTxK.swapaxes(1, 2).astype(q_BxTxHxK.dtype)


def _splash_tile(length: int, window: int) -> int:
    """Return the number of queries and keys of a tile: a power of two that divides the sequence, at most 1,024.

    With a window a tile is not much larger than it, so that tiles outside of the window can be skipped.
    """
    tile = int(np.gcd(length, _SPLASH_TILE))
    while window and tile > max(window, _LANES):
        tile //= 2
    return tile


@functools.cache
def _splash_kernel(heads: int, length: int, window: int, interpret: bool) -> Any:
    """Return the kernel for one sequence: queries [H, T, K], keys and values [G, T, K], segment ids."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    block = _splash_tile(length, window)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    # The mask's tables are constants; evaluated now even inside a trace, so that the cached kernel holds no tracer.
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=KEPT,
            interpret=interpret,
        )
