"""Optional parts of the model, which come from the speed runs modded-nanogpt and nanochat; a standard model has none.

Each is off by default and has an option in `model`: `attention_gate`, `value_embeddings` and `residual_scales`.
Parameters start at values with which a layer computes about what it does without them.

Shapes: B batch, T tokens, D dim, C channels of a gate's input, H query heads, G key/value heads, K channels of a head,
V vocabulary, N layers with value embeddings, L layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.config.schema import ModelConfig
from slm_jax.distributed.partitioning import FSDP, REPLICATED, TENSOR
from slm_jax.model import ops
from slm_jax.model.layers import unstack_layers
from slm_jax.model.precision import Policy
from slm_jax.model.recomputation import keep

_SKIP_START = 0.1  # initial scale of the skip from the embeddings, as in nanochat


class LayerValues(NamedTuple):
    """Value embeddings of one layer.

    Attributes:
        rows_BxTxGK: The tokens' rows of the layer's table.
        gate_CxG: Weights of the gate of each head.
    """

    rows_BxTxGK: jax.Array
    gate_CxG: jax.Array


def create_gate(config: ModelConfig, heads: int) -> nnx.Param[jax.Array]:
    """Return the weights [C, heads] of a gate for each head; at 0 all gates are 1."""
    return nnx.Param(jnp.zeros((config.gate_channels, heads), jnp.float32), partition=(None, TENSOR))


def gates(x_BxTxD: jax.Array, weight_CxH: jax.Array, policy: Policy) -> jax.Array:
    """Return 2 · sigmoid(x·w) of the first C channels of x, float32 [B, T, H, 1].

    Gated attention (arXiv:2505.06708) has sigmoid(x·w) with all channels; a few channels are enough for modded-nanogpt
    and nanochat, and the factor makes a new gate neutral.
    """
    x_BxTxC = x_BxTxD[..., : len(weight_CxH)]
    logits_BxTxH = keep(ops.matmul(x_BxTxC, weight_CxH, policy.compute, policy.platform))
    return 2 * jax.nn.sigmoid(logits_BxTxH.astype(jnp.float32))[..., None]


def scale_heads(x_BxTxHxK: jax.Array, scales_BxTxHx1: jax.Array) -> jax.Array:
    """Return x times one float32 factor for each head, in the dtype of x."""
    return (x_BxTxHxK.astype(jnp.float32) * scales_BxTxHx1).astype(x_BxTxHxK.dtype)


def add_values(v_BxTxGxK: jax.Array, x_BxTxD: jax.Array, values: LayerValues, policy: Policy) -> jax.Array:
    """Return the values of attention plus the gated value embeddings (nanochat), in the dtype of the values.

    Args:
        v_BxTxGxK: Values that the layer projects.
        x_BxTxD: Input of the layer's attention, of which the gates are a function.
        values: Value embeddings of the layer.
        policy: Dtype of the gates' product.
    """
    rows_BxTxGxK = values.rows_BxTxGK.reshape(v_BxTxGxK.shape).astype(jnp.float32)
    gated_BxTxGxK = gates(x_BxTxD, values.gate_CxG, policy) * rows_BxTxGxK
    return (v_BxTxGxK.astype(jnp.float32) + gated_BxTxGxK).astype(v_BxTxGxK.dtype)


class ValueEmbeddings(nnx.Module):
    """A second embedding of the tokens for each of some layers, which is added to the layer's values."""

    def __init__(self, config: ModelConfig, rows: int, rngs: nnx.Rngs):
        """Draw the tables from normal(0, init_std).

        Args:
            config: The layers that have value embeddings, and their width.
            rows: Rows of a table: the vocabulary and its padding.
            rngs: Source of the initial tables.
        """
        kv_heads = config.kv_heads or config.heads
        layers = len(config.value_embeddings)
        shape = (layers, rows, kv_heads * config.head_width)
        table_NxVxGK = config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.layers = config.value_embeddings
        self.table = nnx.Param(table_NxVxGK, partition=(None, TENSOR, FSDP))
        gate_NxCxG = jnp.zeros((layers, config.gate_channels, kv_heads), jnp.float32)
        self.value_gate = nnx.Param(gate_NxCxG, partition=(None, None, TENSOR))

    def of_layers(self, depth: int, lookup: Callable[[jax.Array], jax.Array]) -> list[LayerValues | None]:
        """Return the value embeddings of each layer of a model, None for a layer that has none.

        Args:
            depth: Layers of the model.
            lookup: Function of a table [V, G·K] that returns the tokens' rows, [B, T, G·K].
        """
        values: list[LayerValues | None] = [None] * depth
        parts = unstack_layers((self.table[...], self.value_gate[...]), len(self.layers))
        for layer, (table_VxGK, gate_CxG) in zip(self.layers, parts, strict=True):
            values[layer] = LayerValues(lookup(table_VxGK), gate_CxG)
        return values


def stack_values(values: list[LayerValues | None]) -> Any:
    """Return the value embeddings of all layers as one tree of arrays [L, …], with zeros where a layer has none."""
    present = next((value for value in values if value is not None), None)
    if present is None:
        return None
    zeros = jax.tree.map(jnp.zeros_like, present)
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *(value or zeros for value in values))


def create_residual_scales() -> tuple[nnx.Param[jax.Array], nnx.Param[jax.Array]]:
    """Return the scales of a layer's input and of the skip from the embeddings, float32 scalars."""
    starts = (1.0, _SKIP_START)
    residual, skip = (nnx.Param(jnp.array(start, jnp.float32), partition=REPLICATED) for start in starts)
    return residual, skip


def skip_input(x_BxTxD: jax.Array, eps: float) -> jax.Array:
    """Return the embeddings divided by their root mean square, which each layer adds a share of, in the dtype of x."""
    x_f32 = x_BxTxD.astype(jnp.float32)
    return (x_f32 * jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + eps)).astype(x_BxTxD.dtype)


def mix_residual(x_BxTxD: jax.Array, skip_BxTxD: jax.Array, residual: jax.Array, skip: jax.Array) -> jax.Array:
    """Return residual · x + skip · embeddings, the input of a layer with `model.residual_scales`, in the dtype of x."""
    mixed_BxTxD = residual * x_BxTxD.astype(jnp.float32) + skip * skip_BxTxD.astype(jnp.float32)
    return mixed_BxTxD.astype(x_BxTxD.dtype)
