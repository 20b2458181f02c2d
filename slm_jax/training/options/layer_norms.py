"""Norms of each layer (`log.layers`): computed inside the step, written to layers.jsonl."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.training.options import loss_scale
from slm_jax.training.train_step import Outcome, TrainState


def add_to_metrics(before: TrainState, outcome: Outcome) -> Outcome:
    """Add the metric "layers", norms of gradient, parameters and update by layer, to those of a step."""
    trees = {"grad_norm": outcome.grads, "param_norm": outcome.state.params, "update_norm": outcome.updates}
    layers = {name: layer_norms(tree) for name, tree in trees.items()}
    if before.loss_scale:
        overflow = loss_scale.is_overflow(outcome.metrics["loss"], outcome.metrics["grad_norm"])
        layers = loss_scale.without_nan(layers, overflow)
    return outcome._replace(metrics=outcome.metrics | {"layers": layers})


def layer_norms(tree: Any) -> dict[str, jax.Array]:
    """Return the Euclidean norm of each layer of a tree of parameters or gradients.

    Returns:
        By top-level name of the tree: a scalar, or [L] for the blocks.
    """
    norms = {}
    for name, subtree in tree.items():
        first_axis = 1 if name == "blocks" else 0  # the norm is over all axes but that of the layers
        squares = [jnp.sum(jnp.square(x), axis=tuple(range(first_axis, x.ndim))) for x in jax.tree.leaves(subtree)]
        norms[name] = jnp.sqrt(sum(squares))
    return norms


def record(step: int, layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the record of one step in layers.jsonl.

    Args:
        step: Number of the step.
        layers: The metric "layers": norms of gradient, parameters and update by layer.

    Returns:
        {"step": …, quantity: {layer: value}}, with quantities grad_norm, param_norm and update_ratio (norm of the
        update over norm of the parameters). None stands for values that are not finite.
    """
    record: dict[str, Any] = {"step": step}
    for quantity, norms in layers.items():
        record[quantity] = {}
        for name, value in norms.items():
            values = jax.device_get(value)
            by_layer = {name: values} if values.ndim == 0 else {f"{name}.{i}": v for i, v in enumerate(values)}
            record[quantity] |= {layer: float(v) if math.isfinite(v) else None for layer, v in by_layer.items()}
    updates = record.pop("update_norm")
    record["update_ratio"] = {}
    for (layer, update_norm), param_norm in zip(updates.items(), record["param_norm"].values(), strict=True):
        has_ratio = param_norm and update_norm is not None
        record["update_ratio"][layer] = update_norm / param_norm if has_ratio else None
    return record
