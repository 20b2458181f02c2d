"""Low-rank adapters (LoRA, arXiv:2106.09685): x·w + (alpha / rank) (x·a)·b, with the weight w frozen.

Only `a` and `b` of each adapted linear layer are trained. `a` [in, rank] is drawn as PEFT draws it, `b` [rank, out]
starts at 0, so that the first step computes exactly what the frozen weights do. The tree of a model with adapters is
that of its weights with one more key, "adapter", next to each adapted "weight"; without adapters nothing here is used.

The products with frozen weights need no gradient of the weight: the backward pass costs one product in place of two.

Shapes: L layers, I inputs, O outputs, R rank.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.config.schema import LoraConfig
from slm_jax.distributed.partitioning import Partition
from slm_jax.model import ops
from slm_jax.model.precision import Policy
from slm_jax.model.recomputation import keep

SUBLAYERS = {
    "query": "attention",
    "key": "attention",
    "value": "attention",
    "out": "attention",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}
"""The module of a block that holds each linear layer."""

ADAPTER = "adapter"
"""Key of the adapter in the parameters of a linear layer."""

Params = dict[str, Any]


class Adapter(nnx.Module):
    """The correction (alpha / rank) (x·a)·b of a linear layer's output."""

    def __init__(self, a: jax.Array, b: jax.Array, scale: float, partition: Partition, policy: Policy):
        """Create the adapter.

        Args:
            a: float32 [I, R], or stacked over the layers, [L, I, R].
            b: float32 [R, O], or stacked, [L, R, O].
            scale: alpha / rank.
            partition: Partition of the adapted weight, [I, O].
            policy: Dtype of the products' operands, and the hardware that they run on.
        """
        inputs, outputs = partition
        self.a = nnx.Param(a, partition=(inputs, None))
        self.b = nnx.Param(b, partition=(None, outputs))
        self.scale = scale
        self.policy = policy

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return y plus the correction, in the dtype of y.

        Args:
            x: Input of the linear layer, [..., I].
            y: Its output with the frozen weight, [..., O].
        """
        options = (self.policy.compute, self.policy.platform)
        low_rank = keep(ops.matmul(x, self.a[...], *options))
        correction = ops.matmul(low_rank, self.b[...], *options).astype(jnp.float32)
        return (y.astype(jnp.float32) + self.scale * correction).astype(y.dtype)


def scale_of(config: LoraConfig) -> float:
    """Return the factor of the adapters' product, alpha / rank."""
    return config.alpha / config.rank


def attach(model: Any, config: LoraConfig) -> None:
    """Add adapters, with zeros in them, to the linear layers of a Transformer's blocks that the config names.

    Args:
        model: The model, changed in place.
        config: Rank, alpha and targets.
    """
    for target in config.targets:
        linear = getattr(getattr(model.blocks, SUBLAYERS[target]), target)
        layers, inputs, outputs = linear.weight[...].shape
        a, b = jnp.zeros((layers, inputs, config.rank)), jnp.zeros((layers, config.rank, outputs))
        partition = linear.weight.get_metadata()["partition"]
        linear.adapter = Adapter(a, b, scale_of(config), partition, linear.policy)


def init_adapters(base: Params, config: LoraConfig, key: jax.Array) -> Params:
    """Return adapters whose product is 0: b is 0, a is drawn uniformly from ±1 / sqrt(I), as PEFT does.

    Args:
        base: Parameters of the model without adapters, or their shapes.
        config: Rank and targets.
        key: Key of the draws.

    Returns:
        Pure dict of float32 arrays, {"blocks": {"attention": {"query": {"adapter": {"a": …, "b": …}}, …}, …}}.
    """
    adapters: Params = {}
    for target, sublayer in SUBLAYERS.items():
        if target not in config.targets:
            continue
        layers, inputs, outputs = base["blocks"][sublayer][target]["weight"].shape
        bound = 1 / math.sqrt(inputs)
        own_key = jax.random.fold_in(key, list(SUBLAYERS).index(target))
        a_LxIxR = jax.random.uniform(own_key, (layers, inputs, config.rank), jnp.float32, -bound, bound)
        b_LxRxO = jnp.zeros((layers, config.rank, outputs), jnp.float32)
        adapters.setdefault("blocks", {}).setdefault(sublayer, {})[target] = {ADAPTER: {"a": a_LxIxR, "b": b_LxRxO}}
    return adapters


def freeze(params: Params, policy: Policy) -> Params:
    """Return the parameters of a model as the frozen part of a training state.

    The matrices of the blocks have the dtype of the products, which round them to it in any case, and no gradient: the
    result of a step is the same, and they take half of the memory. Everything else stays float32.
    """
    blocks = jax.tree.map(lambda x: x.astype(policy.compute) if x.ndim == 3 else x, params["blocks"])
    return {**params, "blocks": blocks}
