"""Counts of a batch's tokens inside the compiled step: those that are not padding, and the keys that they attend to.

Shapes: B sequences, T tokens.
"""

import jax
import jax.numpy as jnp

from slm_jax.utils.batch import IGNORE_INDEX, Batch


def count_input_tokens(batch: Batch) -> jax.Array:
    """Return the number of tokens that are not padding, int32; in packed windows all tokens, see `real_tokens`."""
    real = real_tokens(batch)
    return jnp.int32(batch["input_ids"].size) if real is None else jnp.sum(real, dtype=jnp.int32)


def real_tokens(batch: Batch) -> jax.Array | None:
    """Return which tokens are not padding, bool [B, T].

    In segmented and best-fit rows padding has position 0, id 0 and no label. The first token of a prompt may have the
    same, but one of position 1 follows it. None for packed windows without segments, of which at most the last one of
    an epoch has padding.

    Args:
        batch: int32 arrays [B, T].
    """
    if "attention_mask" in batch:
        return batch["attention_mask"].astype(bool)
    if "positions" not in batch:
        return None
    positions_BxT = batch["positions"]
    next_BxT = jnp.pad(positions_BxT[:, 1:], ((0, 0), (0, 1)))
    is_content_BxT = (batch["input_ids"] != 0) | (batch["labels"] != IGNORE_INDEX)
    return is_content_BxT | (positions_BxT > 0) | (next_BxT == 1)


def layers_mean_context(batch: Batch, windows: tuple[int, ...]) -> jax.Array:
    """Return `mean_context`, averaged over the layers with these windows."""
    if len(set(windows)) == 1:
        return mean_context(batch, windows[0])
    contexts = [windows.count(window) * mean_context(batch, window) for window in sorted(set(windows))]
    return jnp.sum(jnp.stack(contexts)) / len(windows)


def mean_context(batch: Batch, window: int) -> jax.Array:
    """Return the number of keys that a token attends to, itself included: the mean over all that are not padding.

    Args:
        batch: int32 arrays [B, T]; with attention_mask, or segment_ids and positions.
        window: Size of the causal window; 0: no window.

    Returns:
        float32 scalar.
    """
    ids_BxT = batch["input_ids"]
    real_BxT = real_tokens(batch)
    real_BxT = jnp.ones_like(ids_BxT, bool) if real_BxT is None else real_BxT
    segments_BxT = jnp.where(real_BxT, batch.get("segment_ids", jnp.zeros_like(ids_BxT)), -1)
    index_T = jnp.arange(ids_BxT.shape[1])
    is_start_BxT = jnp.pad(segments_BxT[:, 1:] != segments_BxT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start_BxT = jax.lax.cummax(jnp.where(is_start_BxT, index_T, 0), axis=1)
    keys_BxT = index_T - start_BxT + 1
    keys_BxT = jnp.minimum(keys_BxT, window) if window else keys_BxT
    total = jnp.sum(jnp.where(real_BxT, keys_BxT, 0), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(real_BxT, dtype=jnp.float32), 1.0)
