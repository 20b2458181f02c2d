"""The operations that decide speed, each with a naive twin that says what it computes.

The only place that asks which backend runs.
"""

from slm_jax.model.ops.attention import (
    attention,
    cache_dtype,
    cache_mask,
    cached_attention,
    causal_mask,
    describe_attention,
    masked_attention,
    naive_attention,
    write_cache,
)
from slm_jax.model.ops.backend import compute_dtype, describe_precision
from slm_jax.model.ops.cross_entropy import ContextTokens, LossSums, LossWeights, cross_entropy, naive_cross_entropy
from slm_jax.model.ops.matmul import einsum, matmul, naive_matmul

__all__ = [
    "ContextTokens",
    "LossSums",
    "LossWeights",
    "attention",
    "cache_dtype",
    "cache_mask",
    "cached_attention",
    "causal_mask",
    "compute_dtype",
    "cross_entropy",
    "describe_attention",
    "describe_precision",
    "einsum",
    "masked_attention",
    "matmul",
    "naive_attention",
    "naive_cross_entropy",
    "naive_matmul",
    "write_cache",
]
