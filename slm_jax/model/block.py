"""One layer of the model: attention and MLP, each after a norm.

RMSNorm before each sub-layer, rotary position embeddings, causal attention with an optional local window and grouped
queries, SwiGLU or squared ReLU, no biases except optional ones of queries, keys and values. Parameters are float32; the
dtypes of products and activations are those of the `Policy` (precision.py).

Each parameter declares the axes of the mesh that it is split over where it is created (distributed/partitioning.py).
The first matrices of a sub-layer are split by columns over "tensor", the last one by rows, so that a sub-layer needs
one all-reduce (Megatron-LM, arXiv:1909.08053); the other axis of each matrix is split over "fsdp".

Shapes: B batch, T tokens, D dim, H query heads, G key/value heads, K channels of a head.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.config.schema import ModelConfig
from slm_jax.distributed.partitioning import FSDP, REPLICATED, TENSOR, Partition
from slm_jax.model import ops
from slm_jax.model.dropout import drop
from slm_jax.model.extras import (
    LayerValues,
    add_values,
    create_gate,
    create_residual_scales,
    gates,
    mix_residual,
    scale_heads,
)
from slm_jax.model.precision import Policy
from slm_jax.model.recomputation import keep
from slm_jax.model.rotary import RotaryTables, rotate


def normal_init(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> jax.Array:
    """Return float32 values drawn from normal(0, std)."""
    key = rngs.params()  # drawn for zeros too: the other parameters are the same whatever the std of one
    return std * jax.random.normal(key, shape, jnp.float32) if std else jnp.zeros(shape, jnp.float32)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32, in the dtype of x (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float, *, keep_rms: bool = False):
        """Create a norm over the last axis, of size `dim`; `eps` is added to the mean square.

        `keep_rms`: compute 1 / rms(x) apart, and keep it for the backward pass.
        """
        self.eps = eps
        self.keep_rms = keep_rms
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), partition=REPLICATED)

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        inverse_f32 = jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + self.eps)
        if self.keep_rms:
            inverse_f32 = keep(jax.lax.optimization_barrier(inverse_f32))
        return (x_f32 * inverse_f32 * self.scale[...]).astype(x.dtype)


class Linear(nnx.Module):
    """x·w, or x·w + b, in the dtype of x; the weight [in, out] is drawn from normal(0, std), a bias is 0.

    Attributes:
        adapter: Function of the input and x·w that corrects the latter (lora.py); None: no correction.
    """

    adapter: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        partition: Partition,
        policy: Policy,
        rngs: nnx.Rngs,
        *,
        std: float,
        bias: bool = False,
    ):
        """Create the layer.

        Args:
            inputs: Size of the last axis of x.
            outputs: Size of the last axis of the result.
            partition: Mesh axes that the input and the output axis of the weight are split over.
            policy: Dtype of the product's operands, and the hardware that it runs on.
            rngs: Source of the initial weight.
            std: Standard deviation of the initial weight.
            bias: Add a bias.
        """
        self.weight = nnx.Param(normal_init(rngs, (inputs, outputs), std), partition=partition)
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32), partition=partition[1:]) if bias else None
        self.policy = policy

    def __call__(self, x: jax.Array) -> jax.Array:
        y = ops.matmul(x, self.weight[...], self.policy.compute, self.policy.platform)
        if self.adapter is not None:
            y = self.adapter(x, y)
        return y if self.bias is None else (y.astype(jnp.float32) + self.bias[...]).astype(y.dtype)


class Attention(nnx.Module):
    """The projections of causal self-attention with rotary positions and grouped queries."""

    def __init__(self, config: ModelConfig, policy: Policy, rngs: nnx.Rngs):
        """Create the projections; `config.init_std` and `output_std` are those of the initial weights."""
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.width = config.head_width
        inner: dict[str, Any] = {"std": config.init_std, "bias": config.qkv_bias}
        self.query = Linear(config.dim, self.heads * self.width, (FSDP, TENSOR), policy, rngs, **inner)
        self.key = Linear(config.dim, self.kv_heads * self.width, (FSDP, TENSOR), policy, rngs, **inner)
        self.value = Linear(config.dim, self.kv_heads * self.width, (FSDP, TENSOR), policy, rngs, **inner)
        self.out = Linear(self.heads * self.width, config.dim, (TENSOR, FSDP), policy, rngs, std=config.output_std)
        # On GPUs, XLA would write the normalized heads in float32 and read them again to rotate them. If 1 / rms has a
        # kernel of its own, the rotation computes the product with it.
        norm = functools.partial(RMSNorm, self.width, config.norm_eps, keep_rms=policy.platform.name == "gpu")
        self.query_norm = norm() if config.qk_norm else None
        self.key_norm = norm() if config.qk_norm else None
        self.head_gate = create_gate(config, config.heads) if config.attention_gate else None
        self.policy = policy

    def project(
        self, x_BxTxD: jax.Array, rotary: RotaryTables | None, values: LayerValues | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries [B, T, H, K], keys and values [B, T, G, K], in the dtype of x; rotate with tables."""
        b, t, _ = x_BxTxD.shape
        q_BxTxHxK = keep(self.query(x_BxTxD)).reshape(b, t, self.heads, self.width)
        k_BxTxGxK = keep(self.key(x_BxTxD)).reshape(b, t, self.kv_heads, self.width)
        v_BxTxGxK = keep(self.value(x_BxTxD)).reshape(b, t, self.kv_heads, self.width)
        if self.query_norm is not None and self.key_norm is not None:
            q_BxTxHxK = self.query_norm(q_BxTxHxK)
            k_BxTxGxK = self.key_norm(k_BxTxGxK)
        if values is not None:
            v_BxTxGxK = add_values(v_BxTxGxK, x_BxTxD, values, self.policy)
        if rotary is None:
            return q_BxTxHxK, k_BxTxGxK, v_BxTxGxK
        platform = self.policy.platform
        return rotate(q_BxTxHxK, *rotary, platform), rotate(k_BxTxGxK, *rotary, platform), v_BxTxGxK

    def merge_heads(self, out_BxTxHxK: jax.Array, x_BxTxD: jax.Array) -> jax.Array:
        """Return the output of the sub-layer, [B, T, D], from the outputs of the heads and its input."""
        if self.head_gate is not None:
            out_BxTxHxK = scale_heads(out_BxTxHxK, gates(x_BxTxD, self.head_gate[...], self.policy))
        return keep(self.out(out_BxTxHxK.reshape(*out_BxTxHxK.shape[:2], -1)))


def round_up(size: float, multiple: int) -> int:
    """Return the smallest multiple that is at least `size`."""
    return math.ceil(size / multiple) * multiple


def swiglu_width(config: ModelConfig) -> int:
    """Return the inner width of the SwiGLU: 2/3 of mlp_dim, rounded up to a multiple of `mlp_multiple`.

    Its three matrices then have as many parameters as the two of an MLP of width mlp_dim.
    """
    return round_up(2 * config.mlp_dim / 3, config.mlp_multiple)


def mlp_width(config: ModelConfig) -> int:
    """Return the inner width of the MLP."""
    return config.mlp_dim if config.mlp == "relu2" else swiglu_width(config)


class SwiGLU(nnx.Module):
    """(silu(x·gate) * x·up)·down (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, policy: Policy, rngs: nnx.Rngs):
        """Create the three matrices; `config.init_std` and `output_std` are those of the initial weights."""
        width = swiglu_width(config)
        self.gate = Linear(config.dim, width, (FSDP, TENSOR), policy, rngs, std=config.init_std)
        self.up = Linear(config.dim, width, (FSDP, TENSOR), policy, rngs, std=config.init_std)
        self.down = Linear(width, config.dim, (TENSOR, FSDP), policy, rngs, std=config.output_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = keep(self.gate(x)).astype(jnp.float32), keep(self.up(x)).astype(jnp.float32)
        return self.down((jax.nn.silu(gate) * up).astype(x.dtype))


class ReLU2(nnx.Module):
    """relu(x·up)²·down (Primer, arXiv:2109.08668); at width mlp_dim it has as many parameters as the SwiGLU."""

    def __init__(self, config: ModelConfig, policy: Policy, rngs: nnx.Rngs):
        """Create the two matrices; `config.init_std` and `output_std` are those of the initial weights."""
        width = mlp_width(config)
        self.up = Linear(config.dim, width, (FSDP, TENSOR), policy, rngs, std=config.init_std)
        self.down = Linear(width, config.dim, (TENSOR, FSDP), policy, rngs, std=config.output_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        positive = jax.nn.relu(keep(self.up(x)).astype(jnp.float32))
        return self.down((positive * positive).astype(x.dtype))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, policy: Policy, rngs: nnx.Rngs):
        """Create one layer."""
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, policy, rngs)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = (SwiGLU if config.mlp == "swiglu" else ReLU2)(config, policy, rngs)
        scales = create_residual_scales() if config.residual_scales else (None, None)
        self.residual_scale: nnx.Param[jax.Array] | None = scales[0]
        self.skip_scale: nnx.Param[jax.Array] | None = scales[1]

    def __call__(
        self,
        x_BxTxD: jax.Array,
        rotary: RotaryTables | None,
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        dropout: float = 0.0,
        dropout_keys: tuple[jax.Array, jax.Array] | None = None,
        skip_BxTxD: jax.Array | None = None,
        values: LayerValues | None = None,
    ) -> jax.Array:
        """Return the residual stream after the block.

        Args:
            x_BxTxD: Residual stream.
            rotary: Tables of the tokens' positions; None: a layer without rotary positions.
            attend: Function of queries [B, T, H, K], keys and values [B, T, G, K] that returns [B, T, H, K].
            dropout: Rate of the dropout at the end of each sub-layer.
            dropout_keys: For each sub-layer the keys of the examples [B]; None disables dropout.
            skip_BxTxD: Normalized embeddings, with `model.residual_scales`.
            values: Value embeddings of the layer; None: it has none.
        """
        attention_key, mlp_key = (None, None) if dropout_keys is None else dropout_keys
        if self.residual_scale is not None and self.skip_scale is not None and skip_BxTxD is not None:
            x_BxTxD = mix_residual(x_BxTxD, skip_BxTxD, self.residual_scale[...], self.skip_scale[...])
        with jax.named_scope("attention"):
            normed_BxTxD = self.attention_norm(x_BxTxD)
            q, k, v = self.attention.project(normed_BxTxD, rotary, values)
            x_BxTxD += drop(self.attention.merge_heads(attend(q, k, v), normed_BxTxD), dropout, attention_key)
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
