"""The model: a decoder-only Transformer in Flax NNX.

RMSNorm before each sub-layer, rotary position embeddings, causal attention with an optional local window and grouped
queries, SwiGLU, a tied or untied output head, no biases except optional ones of queries, keys and values. Parameters
are float32; the dtypes of products and activations are those of the `Policy` (precision.py). The parameters of all
blocks are stacked, [L, …] each: a few large arrays are faster to update, shard and save than many small ones.

Each parameter declares the axes of the mesh that it is split over where it is created (distributed/partitioning.py).
The first matrices of a sub-layer are split by columns over "tensor", the last one by rows, so that a sub-layer needs
one all-reduce (Megatron-LM, arXiv:1909.08053); the other axis of each matrix is split over "fsdp".

Shapes: B batch, T tokens, S keys, D dim, H query heads, G key/value heads, K channels of a head, V vocabulary, L
layers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.config.schema import ModelConfig
from slm_jax.distributed.partitioning import (
    FSDP,
    REPLICATED,
    TENSOR,
    Partition,
    embedding_lookup,
    shard_by_batch,
)
from slm_jax.distributed.platform import Platform
from slm_jax.model import ops
from slm_jax.model.kv_cache import Cache, KVCache
from slm_jax.model.layers import layer_kinds, scan_layers
from slm_jax.model.precision import Policy
from slm_jax.model.recomputation import choose_remat, choose_scan, keep, recompute
from slm_jax.model.rotary import rotary_frequencies, rotary_scale

INIT_STD = 0.02
"""Standard deviation of the initial matrices."""

RotaryTables = tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]
"""(cos, sin), float32 [B, T, 1, K / 2] each."""


def normal_init(rngs: nnx.Rngs, shape: tuple[int, ...]) -> jax.Array:
    """Return float32 values drawn from normal(0, INIT_STD)."""
    return INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32, in the dtype of x (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float):
        """Create a norm over the last axis, of size `dim`; `eps` is added to the mean square."""
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), partition=REPLICATED)

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        y_f32 = x_f32 * jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + self.eps) * self.scale[...]
        return y_f32.astype(x.dtype)


class Linear(nnx.Module):
    """x·w, or x·w + b, in the dtype of x; the weight [in, out] is drawn from normal(0, INIT_STD), a bias is 0.

    Attributes:
        adapter: Function of the input and x·w that corrects the latter (lora.py); None: no correction.
    """

    adapter: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    def __init__(
        self, inputs: int, outputs: int, partition: Partition, policy: Policy, rngs: nnx.Rngs, bias: bool = False
    ):
        """Create the layer.

        Args:
            inputs: Size of the last axis of x.
            outputs: Size of the last axis of the result.
            partition: Mesh axes that the input and the output axis of the weight are split over.
            policy: Dtype of the product's operands, and the hardware that it runs on.
            rngs: Source of the initial weight.
            bias: Add a bias.
        """
        self.weight = nnx.Param(normal_init(rngs, (inputs, outputs)), partition=partition)
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32), partition=partition[1:]) if bias else None
        self.policy = policy

    def __call__(self, x: jax.Array) -> jax.Array:
        y = ops.matmul(x, self.weight[...], self.policy.compute, self.policy.platform)
        if self.adapter is not None:
            y = self.adapter(x, y)
        return y if self.bias is None else (y.astype(jnp.float32) + self.bias[...]).astype(y.dtype)


def rotary_tables(positions_BxT: jax.Array | np.ndarray, config: ModelConfig) -> RotaryTables:
    """Return cos and sin of the rotary angles (arXiv:2104.09864), times the scale of YaRN.

    NumPy positions give NumPy tables: constants of the compiled program, which would otherwise recompute them wherever
    they are used.

    Args:
        positions_BxT: Position of each token.
        config: The model's options.

    Returns:
        float32 [B, T, 1, K / 2] each.
    """
    xp = np if isinstance(positions_BxT, np.ndarray) else jnp
    angle = positions_BxT.astype(np.float32)[:, :, None, None] * rotary_frequencies(config)
    cos, sin = xp.cos(angle), xp.sin(angle)
    scale = np.float32(rotary_scale(config))
    return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


def rotate(x_BxTxHxK: jax.Array, cos: jax.Array | np.ndarray, sin: jax.Array | np.ndarray) -> jax.Array:
    """Return x with each pair of channels (i, i + K/2) rotated by the angle of its position, in the dtype of x."""
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxHxK.dtype)


class Attention(nnx.Module):
    """The projections of causal self-attention with rotary positions and grouped queries."""

    def __init__(self, config: ModelConfig, policy: Policy, rngs: nnx.Rngs):
        """Create the projections from normal(0, INIT_STD)."""
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.width = config.head_width
        bias = config.qkv_bias
        self.query = Linear(config.dim, self.heads * self.width, (FSDP, TENSOR), policy, rngs, bias)
        self.key = Linear(config.dim, self.kv_heads * self.width, (FSDP, TENSOR), policy, rngs, bias)
        self.value = Linear(config.dim, self.kv_heads * self.width, (FSDP, TENSOR), policy, rngs, bias)
        self.out = Linear(self.heads * self.width, config.dim, (TENSOR, FSDP), policy, rngs)
        self.query_norm = RMSNorm(self.width, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(self.width, config.norm_eps) if config.qk_norm else None

    def project(self, x_BxTxD: jax.Array, rotary: RotaryTables | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries [B, T, H, K], keys and values [B, T, G, K], in the dtype of x; rotate with tables."""
        b, t, _ = x_BxTxD.shape
        q_BxTxHxK = keep(self.query(x_BxTxD)).reshape(b, t, self.heads, self.width)
        k_BxTxGxK = keep(self.key(x_BxTxD)).reshape(b, t, self.kv_heads, self.width)
        v_BxTxGxK = keep(self.value(x_BxTxD)).reshape(b, t, self.kv_heads, self.width)
        if self.query_norm is not None and self.key_norm is not None:
            q_BxTxHxK = self.query_norm(q_BxTxHxK)
            k_BxTxGxK = self.key_norm(k_BxTxGxK)
        if rotary is None:
            return q_BxTxHxK, k_BxTxGxK, v_BxTxGxK
        return rotate(q_BxTxHxK, *rotary), rotate(k_BxTxGxK, *rotary), v_BxTxGxK

    def merge_heads(self, out_BxTxHxK: jax.Array) -> jax.Array:
        """Return the output of the sub-layer, [B, T, D]."""
        return keep(self.out(out_BxTxHxK.reshape(*out_BxTxHxK.shape[:2], -1)))


def round_up(size: float, multiple: int) -> int:
    """Return the smallest multiple that is at least `size`."""
    return math.ceil(size / multiple) * multiple


def swiglu_width(config: ModelConfig) -> int:
    """Return the inner width of the SwiGLU: 2/3 of mlp_dim, rounded up to a multiple of `mlp_multiple`.

    Its three matrices then have as many parameters as the two of an MLP of width mlp_dim.
    """
    return round_up(2 * config.mlp_dim / 3, config.mlp_multiple)


class SwiGLU(nnx.Module):
    """(silu(x·gate) * x·up)·down (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, policy: Policy, rngs: nnx.Rngs):
        """Create the three matrices from normal(0, INIT_STD)."""
        width = swiglu_width(config)
        self.gate = Linear(config.dim, width, (FSDP, TENSOR), policy, rngs)
        self.up = Linear(config.dim, width, (FSDP, TENSOR), policy, rngs)
        self.down = Linear(width, config.dim, (TENSOR, FSDP), policy, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = keep(self.gate(x)).astype(jnp.float32), keep(self.up(x)).astype(jnp.float32)
        return self.down((jax.nn.silu(gate) * up).astype(x.dtype))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x))."""

    def __init__(self, config: ModelConfig, policy: Policy, rngs: nnx.Rngs):
        """Create one layer."""
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, policy, rngs)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config, policy, rngs)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        rotary: RotaryTables | None,
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        dropout: float = 0.0,
        dropout_keys: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Return the residual stream after the block.

        Args:
            x_BxTxD: Residual stream.
            rotary: Tables of the tokens' positions; None: a layer without rotary positions.
            attend: Function of queries [B, T, H, K], keys and values [B, T, G, K] that returns [B, T, H, K].
            dropout: Rate of the dropout at the end of each sub-layer.
            dropout_keys: For each sub-layer the keys of the examples [B]; None disables dropout.
        """
        attention_key, mlp_key = (None, None) if dropout_keys is None else dropout_keys
        with jax.named_scope("attention"):
            q, k, v = self.attention.project(self.attention_norm(x_BxTxD), rotary)
            x_BxTxD += drop(self.attention.merge_heads(attend(q, k, v)), dropout, attention_key)
        with jax.named_scope("mlp"):
            return x_BxTxD + drop(self.mlp(self.mlp_norm(x_BxTxD)), dropout, mlp_key)


def cast_weights(params: Any, policy: Policy) -> Any:
    """Return the blocks' parameters with the matrices in the dtype of the products, scales of norms in float32.

    Cast before they are used, matrices are kept for the backward pass, gathered from other devices and read in that
    dtype; their gradients are rounded to it on each device and in each microbatch, and summed over devices in it. Where
    activations are float32, `ops.matmul` casts them, whose gradients of matrices are float32; so it does for float16,
    which overflows with a sum over all tokens of a batch.
    """
    if policy.activation == jnp.float32 or policy.compute == jnp.float16:
        return params
    return jax.tree.map(lambda x: x.astype(policy.compute) if x.ndim == 3 else x, params)


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """Return the dropout keys [B] of a batch's examples, each derived from `key` and the example's index alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def site_keys(keys_B: jax.Array, site: jax.Array | int) -> jax.Array:
    """Return the examples' keys [B] for one place where dropout is applied, numbered by `site`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, site)


def drop(x_BxTxD: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Return x after dropout: zeroed with probability `rate`, scaled by 1 / (1 - rate) elsewhere; x without keys.

    The mask of an example is a function of its own key and of the position in it, so that it depends neither on the
    examples computed together with it, nor on the device that computes it, nor on the padding at its end.
    """
    if keys_B is None or rate == 0.0:
        return x_BxTxD
    kept_BxTxD = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x_BxTxD.shape[1:]))(keys_B)
    # In float32: 1 - rate is a fifth of a percent off in bfloat16, at every sub-layer.
    scaled_BxTxD = (x_BxTxD.astype(jnp.float32) / (1.0 - rate)).astype(x_BxTxD.dtype)
    return jnp.where(kept_BxTxD, scaled_BxTxD, 0.0)


class Transformer(nnx.Module):
    """Decoder-only Transformer: token ids in, next-token logits out.

    Attributes:
        config: The model's configuration.
        vocab_size: Entries of the vocabulary, V.
        policy: Dtypes of products and activations, and the hardware that the model runs on.
        dropout: Current dropout rate.
        embedding: float32 [V', D], with V' the vocabulary padded to a multiple of `vocab_multiple`.
        blocks: One Block whose parameters are stacked over the layers, [L, …].
        final_norm: Norm before the output head.
        head: float32 [V', D]; None if it is tied to the embedding.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        policy: Policy | None = None,
        rngs: nnx.Rngs,
    ):
        """Create a model with random parameters.

        Args:
            config: Sizes and options.
            vocab_size: Entries of the tokenizer's vocabulary.
            policy: Dtypes of products and activations, and the hardware; parameters are float32 in any case. None:
                everything in float32, on JAX's first device.
            rngs: Source of the initial parameters, its stream `params`.
        """
        self.config = config
        self.vocab_size = vocab_size
        policy = policy or Policy()
        self.policy = policy
        self.dropout = config.dropout
        padded_size = round_up(vocab_size, config.vocab_multiple)
        self.embedding = nnx.Param(normal_init(rngs, (padded_size, config.dim)), partition=(TENSOR, FSDP))
        create_blocks = nnx.vmap(lambda layer_rngs: Block(config, policy, layer_rngs))
        self.blocks: Block = nnx.split_rngs(splits=config.depth)(create_blocks)(rngs)
        self.final_norm = RMSNorm(config.dim, config.norm_eps)
        head = None
        if not config.tie_weights:
            head = nnx.Param(normal_init(rngs, (padded_size, config.dim)), partition=(TENSOR, FSDP))
        self.head = head  # assigned once: NNX fixes the kind of an attribute with its first value

    def __call__(self, input_ids, attention_mask=None, segment_ids=None, positions=None, *, dropout_key=None):
        """Return logits float32 [B, T, V] for ids int32 [B, T]; arguments as in `hidden`."""
        x_BxTxD = self.hidden(input_ids, attention_mask, segment_ids, positions, dropout_key=dropout_key)
        return self.logits(x_BxTxD)

    def logits(self, x: jax.Array) -> jax.Array:
        """Return logits float32 [..., V] of final hidden states [..., D]."""
        return ops.row_products(x, self.head_weight(), self.dtype)[..., : self.vocab_size]

    def head_weight(self) -> jax.Array:
        """Return the output head [V', D], which is the embedding if tied; rows from V on are padding."""
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
        """Return the final hidden states.

        Args:
            input_ids_BxT: Token ids, int32.
            attention_mask_BxT: 1 for a real token, 0 for padding, which is never attended to.
            segment_ids_BxT: Attention stays inside a segment.
            positions_BxT: Positions for the rotary angles; 0 to T-1 by default.
            dropout_key: Key of the dropout masks, from which each row derives its own by its index; or one key per row,
                [B] (`example_keys`), where the rows are a part of a larger batch. None disables dropout.

        Returns:
            [B, T, D], in the policy's activation dtype.
        """
        if positions_BxT is None:
            positions_BxT = np.arange(input_ids_BxT.shape[1])[None]
        rotary = rotary_tables(positions_BxT, self.config)
        graph, params = nnx.split(self.blocks)
        params = cast_weights(params, self.policy)

        def layer(kind, x_BxTxD, params_and_index):
            def attend(q, k, v):
                options = (kind.window, attention_mask_BxT, segment_ids_BxT, self.config.attention, self.platform)
                return ops.attention(q, k, v, self.dtype, *options)

            layer_params, index = params_and_index
            block = nnx.merge(graph, layer_params)
            # Sites: 0 is the embedding, 1 + 2 l and 2 + 2 l are the sub-layers of layer l.
            keys = None if keys_B is None else (site_keys(keys_B, 1 + 2 * index), site_keys(keys_B, 2 + 2 * index))
            with jax.named_scope("block"):
                x_BxTxD = block(x_BxTxD, rotary if kind.rotates else None, attend, self.dropout, keys)
            return shard_by_batch(x_BxTxD), None

        keys_B = None
        index_L = None
        if dropout_key is not None and self.dropout:
            keys_B = dropout_key if dropout_key.ndim else example_keys(dropout_key, len(input_ids_BxT))
            index_L = jnp.arange(self.config.depth)
        with jax.named_scope("embedding"):
            x_BxTxD = embedding_lookup(self.embedding[...], input_ids_BxT).astype(self.policy.activation)
        x_BxTxD = shard_by_batch(x_BxTxD)
        x_BxTxD = drop(x_BxTxD, self.dropout, None if keys_B is None else site_keys(keys_B, 0))
        x_BxTxD = self._run_layers(layer, x_BxTxD, (params, index_L))
        with jax.named_scope("final_norm"):
            return self.final_norm(x_BxTxD)

    def _run_layers(self, layer: Callable[..., Any], x_BxTxD: jax.Array, inputs_L: Any) -> jax.Array:
        """Return the residual stream after all layers, in a loop over them or unrolled (recomputation.py).

        Args:
            layer: Function of the kind of a layer, the residual stream and the layer's inputs.
            x_BxTxD: Residual stream before the first layer.
            inputs_L: Inputs of all layers, a tree of arrays with a leading axis of layers.
        """
        is_scanned = choose_scan(self.config.scan_layers, self.config.depth, self.policy)
        remat = choose_remat(self.config.remat, self.policy)
        kinds = layer_kinds(self.config)
        layer_of = {kind: recompute(functools.partial(layer, kind), remat, is_scanned) for kind in dict.fromkeys(kinds)}
        layers = [layer_of[kind] for kind in kinds]
        if is_scanned:
            return scan_layers(layers, x_BxTxD, inputs_L)
        for run_layer, inputs in zip(layers, unstack_layers(inputs_L, self.config.depth), strict=True):
            x_BxTxD, _ = run_layer(x_BxTxD, inputs)
        return x_BxTxD

    def hidden_cached(
        self,
        input_ids_BxT: jax.Array,
        positions_BxT: jax.Array,
        cache: Cache,
        window: int = 0,
        layers: list[Any] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Return the final hidden states of new tokens that also attend to cached ones.

        Args:
            input_ids_BxT: Ids of the new tokens, int32.
            positions_BxT: Position of each new token in its own text, int32; -1 for padding.
            cache: Keys and values of earlier tokens.
            window: Attention window, for generation beyond the trained length; a layer uses its own if that is smaller.
            layers: The blocks' parameters, one tree per layer (`unstack_layers`). A loop that calls this method passes
                them, so that slicing and casting stay out of the loop.

        Returns:
            (hidden states [B, T, D] in the policy's activation dtype, the cache with the new tokens).
        """
        rotary = rotary_tables(positions_BxT, self.config)
        cache, column = cache.reserve(positions_BxT)
        kinds = layer_kinds(self.config)
        windows = [min((w for w in (window, kind.window) if w), default=0) for kind in kinds]
        masks = {w: ops.cache_mask(positions_BxT, cache.positions, w) for w in dict.fromkeys(windows)}
        keys, values = list(cache.keys), list(cache.values)
        x_BxTxD = self.embedding[...][input_ids_BxT].astype(self.policy.activation)
        graph, params = nnx.split(self.blocks)

        def attend(layer, q, k, v):
            keys[layer] = ops.write_cache(keys[layer], k, column, self.dtype)
            values[layer] = ops.write_cache(values[layer], v, column, self.dtype)
            return ops.cached_attention(q, keys[layer], values[layer], masks[windows[layer]], self.dtype)

        for layer, layer_params in enumerate(layers or unstack_layers(params, self.config.depth)):
            tables = rotary if kinds[layer].rotates else None
            x_BxTxD = nnx.merge(graph, layer_params)(x_BxTxD, tables, functools.partial(attend, layer))
        return self.final_norm(x_BxTxD), cache._replace(keys=tuple(keys), values=tuple(values))

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """Return an empty cache of `capacity` columns for `batch` sequences, which share one column per token."""
        shape = (batch * (self.config.kv_heads or self.config.heads), capacity, self.head_width)
        dtype = ops.cache_dtype(self.dtype, self.platform)
        return KVCache(
            keys=tuple(jnp.zeros(shape, dtype) for _ in range(self.config.depth)),
            values=tuple(jnp.zeros(shape, dtype) for _ in range(self.config.depth)),
            positions=jnp.full((batch, capacity), -1, jnp.int32),
            written=jnp.zeros((), jnp.int32),
        )

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the matrix products' operands."""
        return self.policy.compute

    @property
    def platform(self) -> Platform:
        """The hardware that the model runs on."""
        return self.policy.platform

    @property
    def head_width(self) -> int:
        """Channels of one attention head, K."""
        return self.config.head_width

    def set_dropout(self, rate: float) -> None:
        """Set the dropout rate.

        Raises:
            ValueError: Unless 0 <= rate < 1.
        """
        if not 0 <= rate < 1:
            raise ValueError(f"dropout {rate} must be at least 0 and below 1")
        self.dropout = rate

    def resize_token_embeddings(self, vocab_size: int, key: jax.Array | None = None) -> None:
        """Change the vocabulary size in place.

        The rows of ids that both vocabularies have stay bit-identical, new rows are drawn from normal(0, INIT_STD), a
        tied head stays tied. `training.resize.resize_vocabulary` does the same to a training state.

        Args:
            vocab_size: Entries of the new vocabulary.
            key: Key of the new rows; `jax.random.key(0)` by default.
        """
        keys = jax.random.split(jax.random.key(0) if key is None else key)
        padded_size = round_up(vocab_size, self.config.vocab_multiple)
        weights = {"embedding": self.embedding, "head": self.head}
        for (name, weight), weight_key in zip(weights.items(), keys, strict=True):
            if weight is not None:
                new_VxD = INIT_STD * jax.random.normal(weight_key, (padded_size, self.config.dim), jnp.float32)
                resized_VxD = resize_vocabulary_rows(weight[...], self.vocab_size, vocab_size, new_VxD)
                nnx.update(self, {name: resized_VxD})
        self.vocab_size = vocab_size


def resize_vocabulary_rows(old_VxD: jax.Array, old_size: int, new_size: int, new_VxD: jax.Array) -> jax.Array:
    """Return new_VxD with the rows of the ids that both vocabularies have copied from old_VxD.

    Args:
        old_VxD: Rows of the old vocabulary, padding included.
        old_size: Entries of the old vocabulary.
        new_size: Entries of the new vocabulary.
        new_VxD: Initial rows of the new vocabulary, padding included.
    """
    kept = min(old_size, new_size)
    return jnp.concatenate([old_VxD[:kept], new_VxD[kept:]])


def unstack_layers(tree: Any, layers: int) -> list[Any]:
    """Return one tree per layer from a tree whose leaves are stacked, [L, …]."""
    # The gradient of one split is a concatenation; that of L slices would be L zero-padded copies of the full array.
    leaves, structure = jax.tree.flatten(tree)
    slices = [[part.squeeze(0) for part in jax.lax.split(leaf, (1,) * layers)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*slices, strict=True)]
