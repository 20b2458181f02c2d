"""Causal attention by the kernels of accelerators: cuDNN's on NVIDIA GPUs, Pallas' splash attention on TPUs.

Both take what `ops.attention` takes and give the same for every real query; queries of padding may get other numbers,
which nothing reads: no real query sees them, and they have no labels.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

_SPLASH_BLOCK = 512  # queries and keys of a tile; a multiple of the 128 lanes


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
    """`ops.attention` by cuDNN, asked for by name: left to choose, JAX takes XLA's. "xla" is for tests without a GPU.

    Padding and segments make a mask [B, 1, T, T] of which cuDNN makes a bias; causality and window are its own.
    """
    mask_Bx1xTxT = None
    if valid_BxT is not None:
        # A query of padding sees itself: to see nothing would be NaN.
        itself_TxT = jnp.eye(q_BxTxHxK.shape[1], dtype=bool)
        mask_Bx1xTxT = valid_BxT.astype(bool)[:, None, None, :] | itself_TxT
    if segment_ids_BxT is not None:
        same = (segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :])[:, None]
        mask_Bx1xTxT = same if mask_Bx1xTxT is None else same & mask_Bx1xTxT
    out = jax.nn.dot_product_attention(
        q_BxTxHxK.astype(dtype),
        k_BxTxGxK.astype(dtype),
        v_BxTxGxK.astype(dtype),
        mask=mask_Bx1xTxT,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,  # there it is the number before the query
        implementation=implementation,
    )
    return out.astype(jnp.float32)


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
    """`ops.attention` by splash attention: tiles that the causal window leaves empty are never visited.

    Padding is a segment of its own. interpret: run the kernel's program on any backend, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    _, length, _, width = q_BxTxHxK.shape
    segments_BxT = segment_ids_BxT
    if valid_BxT is not None:
        segments_BxT = jnp.where(valid_BxT.astype(bool), 0 if segments_BxT is None else segments_BxT, -1)

    # The kernel expects scaled queries.
    arrays = [(q_BxTxHxK * width**-0.5).astype(dtype), k_BxTxGxK.astype(dtype), v_BxTxGxK.astype(dtype)]
    q_BxHxTxK, k_BxGxTxK, v_BxGxTxK = (x.swapaxes(1, 2) for x in arrays)
    kernel = _splash_kernel(q_BxHxTxK.shape[1], length, window, interpret)
    segments = None if segments_BxT is None else splash.SegmentIds(segments_BxT, segments_BxT)
    out_BxHxTxK = jax.vmap(kernel)(q_BxHxTxK, k_BxGxTxK, v_BxGxTxK, segments)
    return out_BxHxTxK.swapaxes(1, 2).astype(jnp.float32)


@functools.cache
def _splash_kernel(heads: int, length: int, window: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    block = int(np.gcd(length, _SPLASH_BLOCK))
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    with jax.ensure_compile_time_eval():  # the mask's tables are constants, also when made inside a trace
        return splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
