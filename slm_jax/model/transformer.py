"""The model: a decoder-only Transformer in Flax NNX.

A token embedding, the blocks (block.py), a norm, and a tied or untied output head. Parameters are float32; the dtypes
of products and activations are those of the `Policy` (precision.py). The parameters of all blocks are stacked, [L, …]
each: a few large arrays are faster to update, shard and save than many small ones.

Shapes: B batch, T tokens, D dim, H query heads, G key/value heads, K channels of a head, V vocabulary, L layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.config.schema import ModelConfig
from slm_jax.distributed.partitioning import FSDP, TENSOR, embedding_lookup, shard_by_batch
from slm_jax.distributed.platform import Platform
from slm_jax.model import ops
from slm_jax.model.block import Block, RMSNorm, cast_weights, normal_init, round_up
from slm_jax.model.dropout import drop, example_keys, site_keys
from slm_jax.model.extras import LayerValues, ValueEmbeddings, skip_input, stack_values
from slm_jax.model.kv_cache import Cache, KVCache
from slm_jax.model.layers import layer_kinds, scan_layers, unstack_layers
from slm_jax.model.precision import Policy
from slm_jax.model.recomputation import choose_remat, choose_scan, recompute
from slm_jax.model.rotary import rotary_tables


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
        value_embeddings: Further embeddings of some layers; None: no layer has one.
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

        Raises:
            TypeError: `config` is not a ModelConfig.
        """
        if not isinstance(config, ModelConfig):
            raise TypeError(f"expected a ModelConfig, not {type(config).__name__}: such as Config.load().model")
        self.config = config
        self.vocab_size = vocab_size
        policy = policy or Policy()
        self.policy = policy
        self.dropout = config.dropout
        padded_size = round_up(vocab_size, config.vocab_multiple)
        self.embedding = nnx.Param(
            normal_init(rngs, (padded_size, config.dim), config.init_std), partition=(TENSOR, FSDP)
        )
        create_blocks = nnx.vmap(lambda layer_rngs: Block(config, policy, layer_rngs))
        self.blocks: Block = nnx.split_rngs(splits=config.depth)(create_blocks)(rngs)
        self.final_norm = RMSNorm(config.dim, config.norm_eps)
        head = None
        if not config.tie_weights:
            head = nnx.Param(normal_init(rngs, (padded_size, config.dim), config.init_std), partition=(TENSOR, FSDP))
        self.head = head  # assigned once: NNX fixes the kind of an attribute with its first value
        self.value_embeddings = ValueEmbeddings(config, padded_size, rngs) if config.value_embeddings else None

    def __call__(self, input_ids, attention_mask=None, segment_ids=None, positions=None, *, dropout_key=None):
        """Return logits float32 [B, T, V] for ids int32 [B, T]; arguments as in `hidden`."""
        x_BxTxD = self.hidden(input_ids, attention_mask, segment_ids, positions, dropout_key=dropout_key)
        return self.logits(x_BxTxD)

    def logits(self, x: jax.Array) -> jax.Array:
        """Return logits float32 [..., V] of final hidden states [..., D]."""
        logits = ops.row_products(x, self.head_weight(), self.dtype)[..., : self.vocab_size]
        return ops.cap_logits(logits, self.logit_softcap)

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

        def layer(kind, x_BxTxD, inputs):
            def attend(q, k, v):
                options = (kind.window, attention_mask_BxT, segment_ids_BxT, self.config.attention, self.platform)
                return ops.attention(q, k, v, self.dtype, *options)

            layer_params, index, values = inputs
            block = nnx.merge(graph, layer_params)
            # Sites: 0 is the embedding, 1 + 2 l and 2 + 2 l are the sub-layers of layer l.
            keys = None if keys_B is None else (site_keys(keys_B, 1 + 2 * index), site_keys(keys_B, 2 + 2 * index))
            with jax.named_scope("block"):
                extras = (skip_BxTxD, values if kind.has_values else None)
                x_BxTxD = block(x_BxTxD, rotary if kind.rotates else None, attend, self.dropout, keys, *extras)
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
        skip_BxTxD = skip_input(x_BxTxD, self.config.norm_eps) if self.config.residual_scales else None
        values = self._layer_values(lambda table: embedding_lookup(table, input_ids_BxT))
        x_BxTxD = self._run_layers(layer, x_BxTxD, (params, index_L), values)
        with jax.named_scope("final_norm"):
            return self.final_norm(x_BxTxD)

    def _layer_values(self, lookup: Callable[[jax.Array], jax.Array]) -> list[LayerValues | None]:
        """Return the value embeddings of each layer; arguments as of `ValueEmbeddings.of_layers`."""
        if self.value_embeddings is None:
            return [None] * self.config.depth
        dtype = self.policy.activation
        return self.value_embeddings.of_layers(self.config.depth, lambda table: lookup(table).astype(dtype))

    def _run_layers(
        self, layer: Callable[..., Any], x_BxTxD: jax.Array, inputs_L: Any, values: list[LayerValues | None]
    ) -> jax.Array:
        """Return the residual stream after all layers, in a loop over them or unrolled (recomputation.py).

        Args:
            layer: Function of the kind of a layer, the residual stream and the layer's inputs.
            x_BxTxD: Residual stream before the first layer.
            inputs_L: Inputs of all layers, a tuple of trees of arrays with a leading axis of layers.
            values: Value embeddings of each layer, its last input.
        """
        is_scanned = choose_scan(self.config.scan_layers, self.config.depth, self.policy)
        remat = choose_remat(self.config.remat, self.policy)
        kinds = layer_kinds(self.config)
        layer_of = {kind: recompute(functools.partial(layer, kind), remat, is_scanned) for kind in dict.fromkeys(kinds)}
        layers = [layer_of[kind] for kind in kinds]
        if is_scanned:
            return scan_layers(layers, x_BxTxD, (*inputs_L, stack_values(values)))
        for run_layer, inputs, value in zip(layers, unstack_layers(inputs_L, self.config.depth), values, strict=True):
            x_BxTxD, _ = run_layer(x_BxTxD, (*inputs, value))
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
        keys, cached_values = list(cache.keys), list(cache.values)
        x_BxTxD = self.embedding[...][input_ids_BxT].astype(self.policy.activation)
        skip_BxTxD = skip_input(x_BxTxD, self.config.norm_eps) if self.config.residual_scales else None
        values = self._layer_values(lambda table: table[input_ids_BxT])
        graph, params = nnx.split(self.blocks)

        def attend(layer, q, k, v):
            keys[layer] = ops.write_cache(keys[layer], k, column, self.dtype)
            cached_values[layer] = ops.write_cache(cached_values[layer], v, column, self.dtype)
            return ops.cached_attention(q, keys[layer], cached_values[layer], masks[windows[layer]], self.dtype)

        for layer, layer_params in enumerate(layers or unstack_layers(params, self.config.depth)):
            tables = rotary if kinds[layer].rotates else None
            block = nnx.merge(graph, layer_params)
            attend_to_cache = functools.partial(attend, layer)
            x_BxTxD = block(x_BxTxD, tables, attend_to_cache, skip_BxTxD=skip_BxTxD, values=values[layer])
        return self.final_norm(x_BxTxD), cache._replace(keys=tuple(keys), values=tuple(cached_values))

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
    def logit_softcap(self) -> float:
        """Bound of the logits, see `ops.cap_logits`; 0: none."""
        return self.config.logit_softcap

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

        The rows of ids that both vocabularies have stay bit-identical, new rows are drawn from normal(0, init_std), a
        tied head stays tied. `training.resize.resize_vocabulary` does the same to a training state.

        Args:
            vocab_size: Entries of the new vocabulary.
            key: Key of the new rows; `jax.random.key(0)` by default.
        """
        key = jax.random.key(0) if key is None else key
        keys = jax.random.split(key)
        padded_size = round_up(vocab_size, self.config.vocab_multiple)
        weights = {"embedding": self.embedding, "head": self.head}
        for (name, weight), weight_key in zip(weights.items(), keys, strict=True):
            if weight is not None:
                new_VxD = self.config.init_std * jax.random.normal(
                    weight_key, (padded_size, self.config.dim), jnp.float32
                )
                resized_VxD = resize_vocabulary_rows(weight[...], self.vocab_size, vocab_size, new_VxD)
                nnx.update(self, {name: resized_VxD})
        if self.value_embeddings is not None:
            table_NxVxGK = self.value_embeddings.table[...]
            shape = (len(table_NxVxGK), padded_size, table_NxVxGK.shape[-1])
            new_NxVxGK = self.config.init_std * jax.random.normal(jax.random.fold_in(key, 2), shape, jnp.float32)
            resized_NxVxGK = resize_vocabulary_rows(table_NxVxGK, self.vocab_size, vocab_size, new_NxVxGK)
            nnx.update(self.value_embeddings, {"table": resized_NxVxGK})
        self.vocab_size = vocab_size


def resize_vocabulary_rows(old_VxD: jax.Array, old_size: int, new_size: int, new_VxD: jax.Array) -> jax.Array:
    """Return new_VxD with the rows of the ids that both vocabularies have copied from old_VxD.

    Args:
        old_VxD: Rows of the old vocabulary, padding included; or a stack of such tables, as is then new_VxD.
        old_size: Entries of the old vocabulary.
        new_size: Entries of the new vocabulary.
        new_VxD: Initial rows of the new vocabulary, padding included.
    """
    kept = min(old_size, new_size)
    return jnp.concatenate([old_VxD[..., :kept, :], new_VxD[..., kept:, :]], axis=-2)
