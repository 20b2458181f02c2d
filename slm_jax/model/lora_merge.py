"""Adapters outside of training: merged into the weights that they correct, their shapes, and a description.

Shapes: L layers, I inputs, O outputs, R rank.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.config.schema import LoraConfig
from slm_jax.model import ops
from slm_jax.model.lora import ADAPTER, Params, init_adapters, scale_of


def merge(base: Params, adapters: Params, config: LoraConfig) -> Params:
    """Return the parameters of a model without adapters that computes the same: w + (alpha / rank) a·b in float32."""
    if ADAPTER in adapters:
        a_LxIxR, b_LxRxO = adapters[ADAPTER]["a"], adapters[ADAPTER]["b"]
        product_LxIxO = ops.einsum("lir,lro->lio", a_LxIxR, b_LxRxO, jnp.dtype("float32"))
        return {**base, "weight": base["weight"] + scale_of(config) * product_LxIxO}
    merged = dict(base)
    for name, value in adapters.items():
        merged[name] = merge(base[name], value, config)
    return merged


def rounding_error(base: Params, merged: Params, dtype: jnp.dtype) -> jax.Array:
    """Return the error of the adapters' products when merged weights are rounded, as a share of these products.

    Args:
        base: Float32 parameters of the model without adapters.
        merged: The result of `merge`.
        dtype: The dtype that products of matrices round weights to.

    Returns:
        Float32: the root mean square of (rounded merged weight - rounded weight) - product, divided by that of the
        products; 0 if these are 0.
    """

    def rounded(x: jax.Array) -> jax.Array:
        info = jnp.finfo(dtype)
        return jax.lax.reduce_precision(x, info.nexp, info.nmant)

    def squares(weight: jax.Array, new: jax.Array) -> jax.Array:
        product = new - weight
        return jnp.array([jnp.sum((rounded(new) - rounded(weight) - product) ** 2), jnp.sum(product**2)])

    # Products of 0 have no error: parameters without adapters add nothing.
    sums = jnp.stack(jax.tree.leaves(jax.tree.map(squares, base, merged))).sum(axis=0)
    error, total = sums[0], sums[1]
    return jnp.sqrt(error / jnp.where(total, total, 1))


def abstract_adapters(base: Params, config: LoraConfig) -> Params:
    """Return the shapes and shardings of the adapters of a model.

    Args:
        base: Shapes and shardings of the parameters of the model without adapters.
        config: Rank and targets.

    Returns:
        As `init_adapters`, of `jax.ShapeDtypeStruct`; on several devices `a` is split like the input axis of its
        weight, `b` like the output axis.
    """
    shapes = jax.eval_shape(lambda: init_adapters(base, config, jax.random.key(0)))

    def with_sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        *names, _, name = (key.key for key in path)
        sharding = functools.reduce(lambda tree, key: tree[key], names, base)["weight"].sharding
        if isinstance(sharding, NamedSharding):
            layers, inputs, outputs = (*sharding.spec, None, None, None)[:3]
            spec = PartitionSpec(layers, inputs, None) if name == "a" else PartitionSpec(layers, None, outputs)
            sharding = NamedSharding(sharding.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(with_sharding, shapes)


def describe(config: LoraConfig, base: Params, adapters: Params) -> str:
    """Return one line on the adapters of a run."""
    trained, frozen = (sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for tree in (adapters, base))
    return (
        f"LoRA: rank {config.rank}, alpha {config.alpha:g}, on {', '.join(config.targets)}: {trained / 1e6:.3g} M "
        f"parameters are trained, {frozen / 1e6:.4g} M are frozen"
    )
