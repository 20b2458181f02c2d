"""The model's operations, each fast on CPU, GPU and TPU, with a naive twin that defines what it computes.

attention               `attention`, the choice of an implementation and its naive twin; attention to a cache
attention_blocks        the implementation for CPU, and for accelerators without a usable kernel
attention_kernels       cuDNN on NVIDIA GPUs, splash attention on TPUs
cross_entropy           the loss without [B, T, V] logits
softcap, unlikelihood   a bound of the logits, and a term of the loss; both are off by default
matmul                  products in bfloat16 or float32 with float32 accumulation

The model calls the operations by way of this package, `ops.attention(…)`, so that a test can replace one.
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
from slm_jax.model.ops.cross_entropy import LossSums, LossWeights, cross_entropy, naive_cross_entropy
from slm_jax.model.ops.matmul import einsum, matmul, naive_matmul, row_products
from slm_jax.model.ops.softcap import cap_logits
from slm_jax.model.ops.unlikelihood import ContextTokens

__all__ = [
    "ContextTokens",
    "LossSums",
    "LossWeights",
    "attention",
    "cache_dtype",
    "cache_mask",
    "cached_attention",
    "cap_logits",
    "causal_mask",
    "cross_entropy",
    "describe_attention",
    "einsum",
    "masked_attention",
    "matmul",
    "naive_attention",
    "naive_cross_entropy",
    "naive_matmul",
    "row_products",
    "write_cache",
]
