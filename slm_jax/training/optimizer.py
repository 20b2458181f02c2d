"""The optimizers, AdamW, Muon and NorMuon, with gradient clipping and decoupled weight decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from slm_jax.config.schema import OptimizerConfig
from slm_jax.distributed.partitioning import Partitions
from slm_jax.model.params import is_in_blocks, is_matrix, parameter_group
from slm_jax.training.muon import scale_by_muon
from slm_jax.training.schedule import make_momentum, make_schedule


def make_optimizer(
    config: OptimizerConfig, steps: int, dtype: jnp.dtype, partitions: Partitions | None = None
) -> optax.GradientTransformation:
    """Return gradient clipping followed by the optimizer.

    "muon" updates the matrices inside the blocks with Muon, "normuon" with NorMuon, and everything else with AdamW:
    embedding and head are looked up and summed over, not composed like linear maps. Weight decay is decoupled and
    applies to matrices only; a step decays a matrix by its learning rate times the weight decay.
    To add an optimizer, add its name to `OptimizerConfig.name` and a branch here.

    Args:
        config: Optimizer, schedule, weight decay and clipping.
        steps: Optimizer steps of the run, the length of the schedule.
        dtype: Dtype of Muon's products.
        partitions: Declared partitions of the parameters, by which Muon distributes its work; None: one device.

    Returns:
        A transformation of float32 gradients whose matrices are [in, out], stacked over layers inside the blocks.
    """
    rate = _scale_by_learning_rate(config, steps)
    decay = _add_decay(config)

    def adamw() -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_adam(config.beta1, config.beta2), decay, rate)

    if config.name == "adamw":
        update = adamw()
    else:
        beta2 = config.beta2 if config.name == "normuon" else None
        direction = scale_by_muon(dtype, partitions, make_momentum(config, steps), config.orthogonalization, beta2)
        muon = optax.chain(direction, decay, rate)
        update = optax.partition({"muon": muon, "adamw": adamw()}, _optimizer_labels)
    return optax.chain(optax.clip_by_global_norm(config.clip), update) if config.clip else update


def _add_decay(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return the decoupled weight decay of matrices, added to the direction that is subtracted later.

    The cautious one (arXiv:2510.12402, algorithm 1) decays only the weights that the update moves toward 0 as well.
    """

    def matrices(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(is_matrix, tree)

    if not config.cautious_decay:
        return optax.add_decayed_weights(config.weight_decay, mask=matrices)

    def decayed(update: jax.Array, weight: jax.Array) -> jax.Array:
        return update + jnp.where(update * weight >= 0, config.weight_decay * weight, 0)

    cautious = optax.stateless(lambda updates, params: jax.tree.map(decayed, updates, params))
    return optax.masked(cautious, matrices)


def _scale_by_learning_rate(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the multiplication of updates by the negative learning rate of each parameter's group.

    Its state is that of optax's scale_by_learning_rate in any case, so that the states of runs with other rates fit.
    """
    schedule = make_schedule(config, steps)
    common = optax.scale_by_learning_rate(schedule)
    scales = {
        "embedding": config.embedding_lr_scale,
        "head": config.head_lr_scale,
        "vector": config.vector_lr_scale,
        "matrix": 1.0,
    }
    if set(scales.values()) == {1.0}:
        return common

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = common.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(lambda path, u: scales[parameter_group(path, u)] * u, updates), state

    return optax.GradientTransformation(common.init, update)


def _optimizer_labels(tree: Any) -> Any:
    """Return the name of the optimizer that updates each parameter."""

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        return "muon" if is_in_blocks(path) and parameter_group(path, leaf) == "matrix" else "adamw"

    return jax.tree_util.tree_map_with_path(label, tree)
