"""The model: a decoder-only Transformer in Flax NNX.

RMSNorm before each sub-layer, rotary positions, causal attention with a local window and grouped queries, SwiGLU,
a tied or untied head, no biases. Parameters are float32; matrix products run in `dtype` and accumulate in float32.

Shapes: B batch, T tokens, S keys seen, D dim, H query heads, G key/value heads, K head width, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax import ops
from slm_jax.config import ModelConfig

INIT_STD = 0.02


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far; a token at position p lives in slot p of its row."""

    keys: tuple[jax.Array, ...]  # per layer [B, S, G, K], S the capacity
    values: tuple[jax.Array, ...]
    positions: jax.Array  # int32 [B, S], -1 where a slot is empty

    def claim(self, positions_BxT: jax.Array) -> tuple["KVCache", jax.Array]:
        """The cache with slots taken for new tokens, and their slots [B, T]; padding (-1) gets none."""
        capacity = self.positions.shape[1]
        slots_BxT = jnp.where(positions_BxT < 0, capacity, positions_BxT)  # beyond the end: dropped
        rows = jnp.arange(positions_BxT.shape[0])[:, None]
        return self._replace(positions=self.positions.at[rows, slots_BxT].set(positions_BxT, mode="drop")), slots_BxT


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> jax.Array:
    return INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (arXiv:1910.07467)."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * self.scale[...]


class Linear(nnx.Module):
    """x·w without bias, float32 out; weight [in, out] drawn from normal(0, 0.02)."""

    def __init__(self, inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs, (inputs, outputs)))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.matmul(x, self.weight[...], self.dtype)


def rotary_tables(positions_BxT: jax.Array, width: int, base: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin float32 [B, T, 1, width / 2] of the rotary angles (arXiv:2104.09864)."""
    frequency = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions_BxT.astype(jnp.float32)[:, :, None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BxTxHxK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn each pair of channels (i, i + K/2) by the position's angle."""
    a, b = jnp.split(x_BxTxHxK, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped queries."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.heads, self.width = config.heads, config.dim // config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.query = Linear(config.dim, self.heads * self.width, dtype, rngs)
        self.key = Linear(config.dim, self.kv_heads * self.width, dtype, rngs)
        self.value = Linear(config.dim, self.kv_heads * self.width, dtype, rngs)
        self.out = Linear(self.heads * self.width, config.dim, dtype, rngs)
        self.query_norm = RMSNorm(self.width) if config.qk_norm else None
        self.key_norm = RMSNorm(self.width) if config.qk_norm else None
        self.dtype = dtype

    def project(
        self, x_BxTxD: jax.Array, rotary: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, T, H, K], rotated keys and values [B, T, G, K], float32."""
        b, t, _ = x_BxTxD.shape
        q_BxTxHxK = self.query(x_BxTxD).reshape(b, t, self.heads, self.width)
        k_BxTxGxK = self.key(x_BxTxD).reshape(b, t, self.kv_heads, self.width)
        v_BxTxGxK = self.value(x_BxTxD).reshape(b, t, self.kv_heads, self.width)
        if self.query_norm is not None and self.key_norm is not None:
            q_BxTxHxK, k_BxTxGxK = self.query_norm(q_BxTxHxK), self.key_norm(k_BxTxGxK)
        return rotate(q_BxTxHxK, *rotary), rotate(k_BxTxGxK, *rotary), v_BxTxGxK

    def merge_heads(self, out_BxTxHxK: jax.Array) -> jax.Array:
        """The sub-layer's output float32 [B, T, D]."""
        return self.out(out_BxTxHxK.reshape(*out_BxTxHxK.shape[:2], -1))


def swiglu_width(mlp_dim: int) -> int:
    """Inner width of the SwiGLU: 2/3 of mlp_dim, so that its three matrices cost two of mlp_dim; a multiple of 64."""
    return -(-2 * mlp_dim // 3 // 64) * 64


class SwiGLU(nnx.Module):
    """(silu(x·gate) * x·up)·down (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = swiglu_width(config.mlp_dim)
        self.gate = Linear(config.dim, width, dtype, rngs)
        self.up = Linear(config.dim, width, dtype, rngs)
        self.down = Linear(width, config.dim, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x))."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.dim)
        self.attention = Attention(config, dtype, rngs)
        self.mlp_norm = RMSNorm(config.dim)
        self.mlp = SwiGLU(config, dtype, rngs)


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout: zero a share `rate` of x and scale the rest up; no key, no dropout."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


class Transformer(nnx.Module):
    """A language model: token ids in, next-token logits out."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, *, dtype: jnp.dtype = jnp.dtype("float32"), rngs: nnx.Rngs
    ):
        """Draws all parameters (float32) from `rngs.params`; dtype is that of the matrix products."""
        self.config, self.vocab_size, self.dtype, self.dropout = config, vocab_size, dtype, config.dropout
        self.embedding = nnx.Param(_normal(rngs, (vocab_size, config.dim)))
        self.blocks = nnx.List([Block(config, dtype, rngs) for _ in range(config.depth)])
        self.final_norm = RMSNorm(config.dim)
        self.head = None if config.tie_weights else nnx.Param(_normal(rngs, (vocab_size, config.dim)))

    def __call__(self, input_ids, attention_mask=None, segment_ids=None, positions=None, *, dropout_key=None):
        """Logits float32 [B, T, V] for ids int32 [B, T]; arguments as in `hidden`."""
        x_BxTxD = self.hidden(input_ids, attention_mask, segment_ids, positions, dropout_key=dropout_key)
        return self.logits(x_BxTxD)

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 [..., V] of final hidden states [..., D]."""
        return ops.einsum("...d,vd->...v", x, self.head_weight(), self.dtype)

    def head_weight(self) -> jax.Array:
        """The output head [V, D]: the embedding itself when tied."""
        return self.embedding[...] if self.head is None else self.head[...]

    def hidden(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        segment_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states float32 [B, T, D].

        attention_mask: 1 for a real token, 0 for padding (never attended to). segment_ids: attention stays inside a
        segment. positions: for the rotary angles, 0..T-1 when not given. dropout_key: None switches dropout off.
        """
        if positions_BxT is None:
            positions_BxT = jnp.arange(input_ids_BxT.shape[1])[None]
        rotary = rotary_tables(positions_BxT, self.head_width, self.config.rope_base)
        keys = iter(jax.random.split(dropout_key, 2 * self.config.depth + 1) if dropout_key is not None else ())
        x_BxTxD = drop(self.embedding[...][input_ids_BxT], self.dropout, next(keys, None))
        for block in self.blocks:
            q, k, v = block.attention.project(block.attention_norm(x_BxTxD), rotary)
            out = ops.attention(q, k, v, self.dtype, self.config.window, attention_mask_BxT, segment_ids_BxT)
            x_BxTxD += drop(block.attention.merge_heads(out), self.dropout, next(keys, None))
            x_BxTxD += drop(block.mlp(block.mlp_norm(x_BxTxD)), self.dropout, next(keys, None))
        return self.final_norm(x_BxTxD)

    def hidden_cached(
        self, input_ids_BxT: jax.Array, positions_BxT: jax.Array, cache: "KVCache", window: int = 0
    ) -> tuple[jax.Array, "KVCache"]:
        """Final hidden states float32 [B, T, D] of new tokens that also see the cached ones; the cache with them in.

        positions: where each token stands in its own text, -1 for padding. window: as in the config, for generation
        beyond the trained length; 0 uses the config's.
        """
        rotary = rotary_tables(positions_BxT, self.head_width, self.config.rope_base)
        cache, slots = cache.claim(positions_BxT)
        mask = ops.cache_mask(positions_BxT, cache.positions, window or self.config.window)
        keys, values = list(cache.keys), list(cache.values)
        rows = jnp.arange(input_ids_BxT.shape[0])[:, None]
        x_BxTxD = self.embedding[...][input_ids_BxT]
        for i, block in enumerate(self.blocks):
            q, k, v = block.attention.project(block.attention_norm(x_BxTxD), rotary)
            keys[i] = keys[i].at[rows, slots].set(k.astype(keys[i].dtype), mode="drop")
            values[i] = values[i].at[rows, slots].set(v.astype(values[i].dtype), mode="drop")
            out = ops.masked_attention(q, keys[i], values[i], mask, self.dtype)
            x_BxTxD += block.attention.merge_heads(out)
            x_BxTxD += block.mlp(block.mlp_norm(x_BxTxD))
        return self.final_norm(x_BxTxD), cache._replace(keys=tuple(keys), values=tuple(values))

    def empty_cache(self, batch: int, capacity: int) -> "KVCache":
        """A cache for `capacity` tokens of each of `batch` texts."""
        shape = (batch, capacity, self.config.kv_heads or self.config.heads, self.head_width)
        keys, values = ([jnp.zeros(shape, self.dtype) for _ in range(self.config.depth)] for _ in range(2))
        return KVCache(tuple(keys), tuple(values), jnp.full((batch, capacity), -1, jnp.int32))

    @property
    def head_width(self) -> int:
        """Channels of one attention head, K."""
        return self.config.dim // self.config.heads
