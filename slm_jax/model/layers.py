"""The options that differ between the layers of a model, and a compiled loop over layers that differ."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.config.schema import ModelConfig


class LayerKind(NamedTuple):
    """The options that may differ between layers.

    Attributes:
        window: Tokens that the layer attends to; 0: all earlier ones.
        rotates: The layer has rotary positions.
        has_values: The layer has value embeddings (extras.py).
    """

    window: int
    rotates: bool
    has_values: bool


def layer_kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """Return the kind of each layer."""
    return tuple(
        LayerKind(window, layer not in config.nope_layers, layer in config.value_embeddings)
        for layer, window in enumerate(config.layer_windows)
    )


def scan_layers(layers: Sequence[Callable[..., Any]], x_BxTxD: jax.Array, inputs: Any) -> jax.Array:
    """Return the residual stream after all layers, of which one per kind is compiled.

    Args:
        layers: A function for each layer, the same one for layers of a kind: of the residual stream and the layer's
            part of `inputs`, that returns a pair as `jax.lax.scan` expects it.
        x_BxTxD: Residual stream before the first layer.
        inputs: Tree of arrays [L, …].
    """
    distinct = list(dict.fromkeys(layers))
    if len(distinct) == 1:
        return jax.lax.scan(distinct[0], x_BxTxD, inputs)[0]
    which_L = jnp.array([distinct.index(layer) for layer in layers])

    def switch(x_BxTxD: jax.Array, which_and_inputs: Any) -> tuple[jax.Array, None]:
        which, layer_inputs = which_and_inputs
        return jax.lax.switch(which, distinct, x_BxTxD, layer_inputs)

    return jax.lax.scan(switch, x_BxTxD, (which_L, inputs))[0]


def unstack_layers(tree: Any, layers: int) -> list[Any]:
    """Return one tree per layer from a tree whose leaves are stacked, [L, …]."""
    # The gradient of one split is a concatenation; that of L slices would be L zero-padded copies of the full array.
    leaves, structure = jax.tree.flatten(tree)
    slices = [[part.squeeze(0) for part in jax.lax.split(leaf, (1,) * layers)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*slices, strict=True)]
