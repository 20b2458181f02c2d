"""The model: a decoder-only Transformer in Flax NNX.

RMSNorm before each sub-layer, rotary positions, causal attention with a local window and grouped queries, SwiGLU,
a tied or untied head, no biases. Parameters are float32; matrix products run in `dtype` and accumulate in float32.
The parameters of all blocks are stacked, [L, ...] each: a few large arrays to keep, shard and update instead of many.

Shapes: B batch, T tokens, S keys seen, D dim, H query heads, G key/value heads, K head width, V vocabulary, L layers.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.config.schema import ModelConfig
from slm_jax.distributed.partitioning import keep_rows_split, rows_of
from slm_jax.model import ops
from slm_jax.model.kv_cache import KVCache

INIT_STD = 0.02
Rotary = tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]  # cos, sin


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> jax.Array:
    return INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.scale[...]


class Linear(nnx.Module):
    """x·w without bias, float32 out; weight [in, out] drawn from normal(0, 0.02)."""

    def __init__(self, inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs, (inputs, outputs)))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.matmul(x, self.weight[...], self.dtype)


def rotary_tables(positions_BxT: jax.Array | np.ndarray, width: int, base: float) -> Rotary:
    """cos and sin float32 [B, T, 1, width / 2] of the rotary angles (arXiv:2104.09864).

    In NumPy for positions in NumPy: constants of the program, which would else make them again wherever it uses them.
    """
    xp = np if isinstance(positions_BxT, np.ndarray) else jnp
    # Rounded once: a float32 power is an ulp off here and there, which at position 1,000 is 1e-4 of an angle.
    frequency = (base ** (-np.arange(0, width, 2) / width)).astype(np.float32)
    angle = positions_BxT.astype(np.float32)[:, :, None, None] * frequency
    return xp.cos(angle), xp.sin(angle)


def rotate(x_BxTxHxK: jax.Array, cos: jax.Array | np.ndarray, sin: jax.Array | np.ndarray) -> jax.Array:
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
        self.query_norm = RMSNorm(self.width, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(self.width, config.norm_eps) if config.qk_norm else None
        self.dtype = dtype

    def project(self, x_BxTxD: jax.Array, rotary: Rotary) -> tuple[jax.Array, jax.Array, jax.Array]:
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


def round_up(size: float, multiple: int) -> int:
    """The least multiple that is not below size."""
    return math.ceil(size / multiple) * multiple


def swiglu_width(config: ModelConfig) -> int:
    """Inner width of the SwiGLU: 2/3 of mlp_dim, so that its three matrices cost two of mlp_dim, rounded up."""
    return round_up(2 * config.mlp_dim / 3, config.mlp_multiple)


class SwiGLU(nnx.Module):
    """(silu(x·gate) * x·up)·down (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = swiglu_width(config)
        self.gate = Linear(config.dim, width, dtype, rngs)
        self.up = Linear(config.dim, width, dtype, rngs)
        self.down = Linear(width, config.dim, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x))."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, dtype, rngs)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config, dtype, rngs)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        rotary: Rotary,
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        dropout: float = 0.0,
        keys_2: jax.Array | None = None,
    ) -> jax.Array:
        """attend: queries [B, T, H, K], keys and values [B, T, G, K] to [B, T, H, K]; keys: of the two dropouts."""
        q, k, v = self.attention.project(self.attention_norm(x_BxTxD), rotary)
        attention_key, mlp_key = (None, None) if keys_2 is None else keys_2
        x_BxTxD += drop(self.attention.merge_heads(attend(q, k, v)), dropout, attention_key)
        return x_BxTxD + drop(self.mlp(self.mlp_norm(x_BxTxD)), dropout, mlp_key)


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout: zero a share `rate` of x and scale the rest up; no key, no dropout."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


class Transformer(nnx.Module):
    """Token ids in, next-token logits out."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, *, dtype: jnp.dtype = jnp.dtype("float32"), rngs: nnx.Rngs
    ):
        """Draws all parameters (float32) from `rngs.params`; dtype is that of the matrix products."""
        self.config, self.vocab_size, self.dtype, self.dropout = config, vocab_size, dtype, config.dropout
        rows = round_up(vocab_size, config.vocab_multiple)
        self.embedding = nnx.Param(_normal(rngs, (rows, config.dim)))
        stack = nnx.split_rngs(splits=config.depth)(nnx.vmap(lambda layer_rngs: Block(config, dtype, layer_rngs)))
        self.blocks: Block = stack(rngs)  # its parameters are [L, ...]
        self.final_norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_weights else nnx.Param(_normal(rngs, (rows, config.dim)))

    def __call__(self, input_ids, attention_mask=None, segment_ids=None, positions=None, *, dropout_key=None):
        """Logits float32 [B, T, V] for ids int32 [B, T]; arguments as in `hidden`."""
        x_BxTxD = self.hidden(input_ids, attention_mask, segment_ids, positions, dropout_key=dropout_key)
        return self.logits(x_BxTxD)

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 [..., V] of final hidden states [..., D]."""
        return ops.einsum("...d,vd->...v", x, self.head_weight(), self.dtype)[..., : self.vocab_size]

    def head_weight(self) -> jax.Array:
        """The output head [V or more, D]: the embedding itself when tied; rows beyond V are padding."""
        return self.embedding[...] if self.head is None else self.head[...]

    def hidden(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        segment_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | np.ndarray | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states float32 [B, T, D].

        attention_mask: 1 for a real token, 0 for padding (never attended to). segment_ids: attention stays inside a
        segment. positions: for the rotary angles, 0..T-1 when not given. dropout_key: None switches dropout off.
        """
        if positions_BxT is None:
            positions_BxT = np.arange(input_ids_BxT.shape[1])[None]
        rotary = rotary_tables(positions_BxT, self.head_width, self.config.rope_base)
        graph, params = nnx.split(self.blocks)

        def attend(q, k, v):
            how = (self.config.window, attention_mask_BxT, segment_ids_BxT, self.config.attention)
            return ops.attention(q, k, v, self.dtype, *how)

        def layer(x_BxTxD, params_and_keys):
            layer_params, keys_2 = params_and_keys
            x_BxTxD = nnx.merge(graph, layer_params)(x_BxTxD, rotary, attend, self.dropout, keys_2)
            return keep_rows_split(x_BxTxD), None

        keys_Lx2, embedding_key = None, None
        if dropout_key is not None and self.dropout:
            keys_Lx2 = jax.random.split(jax.random.fold_in(dropout_key, 0), (self.config.depth, 2))
            embedding_key = jax.random.fold_in(dropout_key, 1)
        x_BxTxD = keep_rows_split(rows_of(self.embedding[...], input_ids_BxT))
        x_BxTxD = drop(x_BxTxD, self.dropout, embedding_key)
        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.config.remat])
        if self.config.scan_layers:
            x_BxTxD, _ = jax.lax.scan(layer, x_BxTxD, (params, keys_Lx2))
        else:
            for each in unstack_layers((params, keys_Lx2), self.config.depth):
                x_BxTxD, _ = layer(x_BxTxD, each)
        return self.final_norm(x_BxTxD)

    def hidden_cached(
        self,
        input_ids_BxT: jax.Array,
        positions_BxT: jax.Array,
        cache: KVCache,
        window: int = 0,
        layers: list[Any] | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Final hidden states float32 [B, T, D] of new tokens that also see the cached ones; the cache with them in.

        positions: where each token stands in its own text, -1 for padding. window: as in the config, for generation
        beyond the trained length; 0 uses the config's. layers: the blocks' parameters one by one, where they are at
        hand (a loop should not cut and cast them at every step).
        """
        rotary = rotary_tables(positions_BxT, self.head_width, self.config.rope_base)
        cache, column = cache.claim(positions_BxT)
        mask = ops.cache_mask(positions_BxT, cache.positions, window or self.config.window)
        keys, values = list(cache.keys), list(cache.values)
        x_BxTxD = self.embedding[...][input_ids_BxT]
        graph, params = nnx.split(self.blocks)
        for i, layer_params in enumerate(layers or unstack_layers(params, self.config.depth)):

            def attend(q, k, v, i=i):
                keys[i] = ops.write_cache(keys[i], k, column, self.dtype)
                values[i] = ops.write_cache(values[i], v, column, self.dtype)
                return ops.cached_attention(q, keys[i], values[i], mask, self.dtype)

            x_BxTxD = nnx.merge(graph, layer_params)(x_BxTxD, rotary, attend)
        return self.final_norm(x_BxTxD), cache._replace(keys=tuple(keys), values=tuple(values))

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache of `capacity` columns for each of `batch` texts."""
        shape = (batch * (self.config.kv_heads or self.config.heads), capacity, self.head_width)
        dtype = ops.cache_dtype(self.dtype)
        keys, values = ([jnp.zeros(shape, dtype) for _ in range(self.config.depth)] for _ in range(2))
        return KVCache(tuple(keys), tuple(values), jnp.full((batch, capacity), -1, jnp.int32), jnp.zeros((), jnp.int32))

    @property
    def head_width(self) -> int:
        """Channels of one attention head, K."""
        return self.config.dim // self.config.heads

    def set_dropout(self, rate: float) -> None:
        """The dropout rate from here on; raises ValueError unless 0 <= rate < 1."""
        if not 0 <= rate < 1:
            raise ValueError(f"dropout {rate} must be at least 0 and below 1")
        self.dropout = rate

    def resize_token_embeddings(self, vocab_size: int, key: jax.Array | None = None) -> None:
        """Another vocabulary size: rows of the old ids stay bit for bit, new ones are drawn from normal(0, 0.02),
        a tied head stays tied. `resize_vocabulary` of train_step.py does it to a whole training state."""
        keys = jax.random.split(jax.random.key(0) if key is None else key)
        rows = round_up(vocab_size, self.config.vocab_multiple)
        for weight, each in zip((self.embedding, self.head), keys, strict=True):
            if weight is not None:
                new_VxD = INIT_STD * jax.random.normal(each, (rows, self.config.dim), jnp.float32)
                weight.set_value(resize_vocabulary_rows(weight[...], self.vocab_size, vocab_size, new_VxD))
        self.vocab_size = vocab_size


def resize_vocabulary_rows(old_VxD: jax.Array, old_size: int, size: int, new_VxD: jax.Array) -> jax.Array:
    """new with the first rows of old in it: those of the ids that both sizes have."""
    kept = min(old_size, size)
    return jnp.concatenate([old_VxD[:kept], new_VxD[kept:]])


# What the backward pass finds ready, and what it computes again.
REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # kept: linear layers. Again: attention, norms
    "full": None,  # kept: each block's input
}


def unstack_layers(tree: Any, layers: int) -> list[Any]:
    """The trees of single layers out of one whose leaves are [L, ...]."""
    # split's gradient is one concatenation, that of L slices would be L paddings of the whole.
    leaves, structure = jax.tree.flatten(tree)
    split = [[part.squeeze(0) for part in jax.lax.split(leaf, (1,) * layers)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*split, strict=True)]
