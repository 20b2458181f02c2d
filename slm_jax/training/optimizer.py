"""Learning-rate schedules, AdamW and Muon, and which weights decay."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from slm_jax.config.schema import OptimizerConfig
from slm_jax.distributed.partitioning import layer_by_layer, split_of
from slm_jax.model import ops
from slm_jax.model.params import is_in_blocks, is_matrix


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """step (from 0) -> learning rate, for a run of `steps`: linear warm-up, then what `config.schedule` names."""
    peak, floor, warmup = config.lr, config.lr * config.final_lr_fraction, config.warmup_steps
    rest = max(1, steps - warmup)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_lr_fraction)
    elif config.schedule == "wsd":
        decay = max(1, round(config.decay_fraction * rest))
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, floor, decay)], [rest - decay]
        )
    else:
        after = optax.constant_schedule(peak)
    # The first step already has a rate above 0, else it would be lost.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup) if warmup else after
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Clipping, then the optimizer, for a tree of float32 parameters whose matrices are [in, out].

    Muon for the matrices inside the blocks, AdamW for the rest: the embedding and the head are looked up or summed
    over, not composed. Decoupled weight decay on matrices only. dtype: of Muon's products.
    """
    schedule = make_schedule(config, steps)

    def adamw() -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(config.beta1, config.beta2), decay, optax.scale_by_learning_rate(schedule)
        )

    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda tree: jax.tree_util.tree_map_with_path(is_matrix, tree)
    )
    if config.name == "adamw":
        update = adamw()
    else:
        muon = optax.chain(scale_by_muon(dtype), decay, optax.scale_by_learning_rate(schedule))
        update = optax.partition({"muon": muon, "adamw": adamw()}, _labels)
    return optax.chain(optax.clip_by_global_norm(config.clip), update) if config.clip else update


def is_schedule(node: Any) -> bool:
    """Whether a node of an optimizer's state is the schedule's count of steps."""
    return isinstance(node, optax.ScaleByScheduleState)


def _labels(tree: Any) -> Any:
    """Which optimizer updates each parameter."""

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        return "muon" if is_in_blocks(path) and is_matrix(path, leaf) else "adamw"

    return jax.tree_util.tree_map_with_path(label, tree)


def scale_by_muon(dtype: jnp.dtype, beta: float = 0.95) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024): Nesterov momentum, orthogonalised per matrix [..., in, out].

    Updates are scaled to the root mean square of AdamW's (0.2 * sqrt(max(in, out)), arXiv:2502.16982), so that both
    optimizers share one learning rate and one weight decay. optax.contrib.muon computes the same; this one runs its
    products in `dtype` (bfloat16 halves its cost, and Newton-Schulz does not need more).
    """

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads: Any, momentum: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, grads)
        nesterov = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, grads)

        def scaled(path: tuple[Any, ...], x_LxIxO: jax.Array) -> jax.Array:
            split = split_of(path)[1]
            orthogonal = layer_by_layer(functools.partial(orthogonalize, dtype=dtype), x_LxIxO, split)
            return orthogonal * 0.2 * max(x_LxIxO.shape[-2:]) ** 0.5

        return jax.tree_util.tree_map_with_path(scaled, nesterov), momentum

    return optax.GradientTransformation(init, update)


def orthogonalize(x_IxO: jax.Array, dtype: jnp.dtype, steps: int = 5) -> jax.Array:
    """About U·Vᵀ of the singular value decomposition, float32: singular values end up between about 0.7 and 1.2.

    Quintic Newton-Schulz iteration with the coefficients of Jordan et al. (2024); leading axes are batch axes.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x_IxO.shape[-2] > x_IxO.shape[-1]
    x = jnp.swapaxes(x_IxO, -1, -2) if tall else x_IxO
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)

    def dot(left: jax.Array, right: jax.Array) -> jax.Array:
        return ops.einsum("...ij,...jk->...ik", left, right, dtype)

    def iterate(_: int, x: jax.Array) -> jax.Array:
        gram = ops.einsum("...ik,...jk->...ij", x, x, dtype)
        return a * x + dot(b * gram + c * dot(gram, gram), x)

    x = jax.lax.fori_loop(0, steps, iterate, x)  # compiles five times as fast as unrolled
    return jnp.swapaxes(x, -1, -2) if tall else x
