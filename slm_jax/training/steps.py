"""Assembly of the compiled steps of a run: the objective, the optimizer and the options of its config.

Shapes: B sequences of the global batch, T tokens.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from slm_jax.config.schema import Config, TrainConfig
from slm_jax.distributed import sharding
from slm_jax.distributed.partitioning import Partitions
from slm_jax.distributed.platform import Platform
from slm_jax.model import lora
from slm_jax.model.abstract import abstract_model, declared_partitions
from slm_jax.model.ops import LossWeights
from slm_jax.model.params import pure_params
from slm_jax.model.precision import Policy
from slm_jax.model.transformer import Transformer
from slm_jax.training import health
from slm_jax.training.dpo.loss import Preference
from slm_jax.training.muon import state_partitions
from slm_jax.training.objective import NextToken, Objective
from slm_jax.training.optimizer import make_optimizer
from slm_jax.training.options import averaging, layer_norms, loss_scale, skipping
from slm_jax.training.train_step import StepOption, TrainState, eval_step, train_step


class Steps(NamedTuple):
    """The compiled functions of one run.

    Attributes:
        init: () -> TrainState.
        train: (TrainState, Batch) -> (TrainState, metrics); the state is donated.
        evaluate: (weights, Batch) -> sums of the objective, with `TrainState.weights`.
        model: weights -> Transformer.
        partitions: Declared partitions of all arrays of a TrainState.
    """

    init: Any
    train: Any
    evaluate: Any
    model: Callable[[Any], Transformer]
    partitions: Partitions


def make_objective(config: TrainConfig) -> Objective:
    """Return the objective of a config."""
    if config.objective == "dpo":
        return Preference(config.dpo_beta)
    return NextToken(LossWeights(config.z_loss, config.ul_alpha))


def step_options(config: Config, dtype: jnp.dtype) -> Iterator[StepOption]:
    """Yield the options of the steps of a config in the order in which they apply; none for a plain run.

    Args:
        config: The config.
        dtype: The dtype of its products.
    """
    # Skipping comes after all options that change state, as it restores params, opt_state and average (no other field);
    # norms of layers come last: they only read the outcome.
    if config.optimizer.average_decay:
        yield functools.partial(averaging.average_step, config.optimizer.average_decay)
    if loss_scale.is_needed(dtype) or health.is_enabled(config.health):
        yield functools.partial(skipping.skip_unhealthy, config.health)
    if config.log.layers:
        yield layer_norms.add_to_metrics


def init_state(
    config: Config, vocab_size: int, optimizer: optax.GradientTransformation, platform: Platform | None = None
) -> TrainState:
    """Return the state before the first step, drawn from `train.seed`."""
    key = jax.random.key(config.train.seed)
    rngs = nnx.Rngs(params=jax.random.fold_in(key, 0))
    model = Transformer(config.model, vocab_size, policy=Policy.choose(config, platform), rngs=rngs)
    params = pure_params(model)
    base: Any = ()
    if config.lora.rank:
        base = lora.freeze(params, model.policy)
        params = lora.init_adapters(params, config.lora, jax.random.fold_in(key, 2))
    is_scaled = loss_scale.is_needed(model.dtype)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.fold_in(key, 1),
        health=health.init() if is_scaled or health.is_enabled(config.health) else (),
        loss_scale=loss_scale.init() if is_scaled else (),
        base=base,
        average=averaging.init(params) if config.optimizer.average_decay else (),
    )


def make_steps(config: Config, vocab_size: int, mesh: jax.sharding.Mesh | None = None) -> Steps:
    """Bind the train and evaluation steps to a config and compile them.

    Args:
        config: The run's config.
        vocab_size: Entries of the tokenizer's vocabulary.
        mesh: Devices that hold the state, split as the parameters declare, and that the programs are compiled for;
            None: JAX's first device.

    Raises:
        UserError: If a parameter does not divide over the mesh.
    """
    platform = Platform.default() if mesh is None else Platform.of_mesh(mesh)
    graph, _ = abstract_model(config, vocab_size, platform, adapters=True)
    declared = declared_partitions(config, vocab_size)
    partitions = {**declared, **health.PARTITIONS, **state_partitions(config.optimizer, declared)}
    policy = Policy.choose(config, platform)
    optimizer = make_optimizer(config.optimizer, config.train.steps, policy.compute, partitions)
    init = functools.partial(init_state, config, vocab_size, optimizer, platform)
    objective = make_objective(config.train)
    train = functools.partial(
        train_step,
        config=config,
        graph=graph,
        optimizer=optimizer,
        objective=objective,
        options=tuple(step_options(config, policy.compute)),
    )
    evaluate = functools.partial(eval_step, graph=graph, objective=objective.without_additions())
    merge = functools.partial(nnx.merge, graph)
    # jax_debug_nans repeats a step that produced a NaN, for which it needs the state.
    donated = () if config.train.debug else 0
    if mesh is None:
        return Steps(jax.jit(init), jax.jit(train, donate_argnums=donated), jax.jit(evaluate), merge, partitions)
    shardings = sharding.tree_shardings(mesh, jax.eval_shape(init), partitions)
    replicated = sharding.replicated(mesh)
    train = functools.partial(train, param_shardings=shardings.params)
    compile_for_mesh = functools.partial(jax.jit, compiler_options=sharding.compiler_options(mesh) or None)
    return Steps(
        jax.jit(init, out_shardings=shardings),  # created where they belong: no device ever holds all of them
        compile_for_mesh(in_mesh(train, mesh), donate_argnums=donated, out_shardings=(shardings, replicated)),
        compile_for_mesh(in_mesh(evaluate, mesh), out_shardings=replicated),
        merge,
        partitions,
    )


def in_mesh(f: functools.partial, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """Return a partial function traced with the mesh as context, which `distributed.partitioning` acts on."""

    @functools.wraps(f.func)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*args)

    return traced
