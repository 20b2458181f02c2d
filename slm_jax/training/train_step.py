"""The pure, compiled train and evaluation steps.

`loss_fn`, `gradients`, `train_step` and `eval_step` are plain functions of arrays and static arguments; `make_steps`
binds the static ones and compiles them for a mesh.

Shapes: B sequences of the global batch, T tokens, D dim, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from slm_jax.config.schema import Config, HealthConfig
from slm_jax.distributed import sharding
from slm_jax.distributed.partitioning import Partitions
from slm_jax.distributed.platform import Platform
from slm_jax.model import lora, ops
from slm_jax.model.dropout import example_keys
from slm_jax.model.params import abstract_model, declared_partitions, pure_params
from slm_jax.model.precision import Policy
from slm_jax.model.transformer import Transformer
from slm_jax.training import averaging, health, loss_scale
from slm_jax.training.context import count_input_tokens, layers_mean_context
from slm_jax.training.muon import state_partitions
from slm_jax.training.objective import (
    Objective,
    Sums,
    make_objective,
    objective_sums,
    sequences,
    validation_objective,
    zero_sums,
)
from slm_jax.training.optimizer import make_optimizer
from slm_jax.training.schedule import make_schedule
from slm_jax.utils.batch import Batch


class TrainState(NamedTuple):
    """Everything that training changes, and the key that its randomness derives from.

    Attributes:
        step: int32 scalar, the optimizer steps taken.
        params: Pure dict of float32 arrays: what is trained, with LoRA the adapters.
        opt_state: State of the optimizer.
        key: Typed PRNG key; the randomness of a step derives from `fold_in(key, step)`.
        health: `health.Health`; () unless the config enables it or the loss is scaled.
        loss_scale: `loss_scale.LossScale`; () unless the compute dtype is float16.
        base: With LoRA the frozen parameters, see `lora.freeze`; () without.
        average: The average of `params` over the steps, see `averaging`; () unless `optimizer.average_decay` is set.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    health: Any = ()
    loss_scale: Any = ()
    base: Any = ()
    average: Any = ()

    @property
    def weights(self) -> Any:
        """All parameters of the model, the trained and the frozen ones."""
        return lora.join(self.base, self.params) if self.base else self.params

    @property
    def evaluated_weights(self) -> Any:
        """The weights that are validated, sampled and loaded later: the average if there is one."""
        return self._replace(params=self.average["params"]).weights if self.average else self.weights

    def saved_fields(self) -> dict[str, Any]:
        """Return the fields that a checkpoint holds: all that are not empty, without the frozen parameters."""
        return {name: value for name, value in self._asdict().items() if name != "base" and not _is_empty(value)}


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


def _is_empty(field: Any) -> bool:
    return isinstance(field, tuple) and not field


def loss_fn(
    params: Any,
    batch: Batch,
    key: jax.Array | None,
    *,
    graph: nnx.GraphDef,
    weights: Objective,
    scale: jax.Array | None = None,
    base: Any = (),
) -> tuple[jax.Array, Sums]:
    """Return the loss summed over the predicted positions, times a scale, and all sums, not scaled.

    Args:
        params: Pure dict of parameters.
        batch: int32 arrays [B, T].
        key: Key of the dropout masks, or the keys of the rows, [B]; None disables dropout.
        graph: Graph of the model, from `abstract_model`.
        weights: The objective, with the weights of its terms.
        scale: Factor of the loss, see `loss_scale`; None: 1.
        base: With LoRA the frozen parameters; params are the adapters then.
    """
    sums = objective_sums(nnx.merge(graph, lora.join(base, params) if base else params), batch, weights, key)
    return sums.loss if scale is None else scale * sums.loss, sums


def gradients(
    params: Any,
    batch: Batch,
    key: jax.Array | None,
    *,
    graph: nnx.GraphDef,
    weights: Objective,
    grad_accum_steps: int = 1,
    scale: jax.Array | None = None,
    base: Any = (),
) -> tuple[Any, Sums]:
    """Return the gradient of the loss, averaged over the predicted positions (or pairs) of the batch, and the sums.

    The sums of all microbatches are accumulated before one division by the number of predicted positions, so that a
    microbatch with fewer of them weighs less, as it does in one large batch.

    Args:
        params: Pure dict of parameters.
        batch: int32 arrays [B, T].
        key: Key of the dropout masks; None disables dropout. The masks of an example are derived from it and the
            example's index in the batch, so that they are the same in every microbatch.
        graph: Graph of the model.
        weights: The objective, with the weights of its terms.
        grad_accum_steps: Microbatches that the batch is computed in, one after the other; divides B.
        scale: Factor of the loss that is differentiated, which the gradient is divided by again; None: 1.
        base: With LoRA the frozen parameters.
    """
    loss = functools.partial(loss_fn, graph=graph, weights=weights, scale=scale, base=base)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    keys_B = None if key is None else example_keys(key, len(batch["input_ids"]))
    if grad_accum_steps == 1:
        (_, sums), grads = value_and_grad(params, batch, keys_B)
    else:

        def accumulate(totals, microbatch_and_keys):
            (_, sums), grads = value_and_grad(params, *microbatch_and_keys)
            return jax.tree.map(jnp.add, totals, (grads, sums)), None

        # Microbatch i takes every grad_accum_steps-th sequence from i on, so that it has sequences of every device.
        microbatches = jax.tree.map(
            lambda x: x.reshape(-1, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), (dict(batch), keys_B)
        )
        zeros = jax.tree.map(jnp.zeros_like, (params, zero_sums(weights)))
        (grads, sums), _ = jax.lax.scan(accumulate, zeros, microbatches)
    count = jnp.maximum(sums.divisor, 1.0)
    divisor = count if scale is None else count * scale
    return jax.tree.map(lambda g: g / divisor, grads), sums


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: Config,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    param_shardings: Any = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Take one optimizer step.

    Args:
        state: State before the step.
        batch: int32 arrays [B, T], the global batch.
        config: Loss, dropout, accumulation, schedule, health and logging options.
        graph: Graph of the model, from `abstract_model`.
        optimizer: The transformation that made `state.opt_state`.
        param_shardings: Sharding of each parameter; None on one device.

    Returns:
        (state, metrics): the metrics are scalars on the device, and "layers", a dict of norms, if `log.layers` is set.
    """
    objective = make_objective(config.train)
    key = jax.random.fold_in(state.key, state.step) if config.model.dropout else None
    grads, sums = gradients(
        state.params,
        batch,
        key,
        graph=graph,
        weights=objective,
        grad_accum_steps=config.train.grad_accum_steps,
        scale=state.loss_scale.scale if state.loss_scale else None,
        base=state.base,
    )
    if param_shardings is not None:
        # Each device receives the sum of its own part of the gradient (reduce-scatter), not of all of it.
        grads = jax.lax.with_sharding_constraint(grads, param_shardings)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

    schedule = make_schedule(config.optimizer, config.train.steps)
    metrics: dict[str, Any] = {
        **sums.metrics(),
        "lr": jnp.asarray(schedule(state.step), jnp.float32),
        "grad_norm": optax.tree.norm(grads),
    }
    updated = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
    if state.average:
        updated = updated._replace(average=averaging.update(state.average, params, config.optimizer.average_decay))
    if state.health:
        updated, metrics = _skip_unhealthy(state, updated, config.health, metrics)
    metrics |= {"param_norm": optax.tree.norm(updated.params), "tokens": sums.tokens}
    batch = sequences(batch, objective)
    metrics["input_tokens"] = count_input_tokens(batch)
    if "attention_mask" in batch or "segment_ids" in batch:
        metrics["mean_context"] = layers_mean_context(batch, config.model.layer_windows)
    if config.log.layers:
        trees = {"grad_norm": grads, "param_norm": updated.params, "update_norm": updates}
        metrics["layers"] = {name: health.layer_norms(tree) for name, tree in trees.items()}
        if state.loss_scale:
            overflow = loss_scale.is_overflow(metrics["loss"], metrics["grad_norm"])
            metrics["layers"] = loss_scale.without_nan(metrics["layers"], overflow)
    return updated, metrics


def _skip_unhealthy(
    old: TrainState, new: TrainState, config: HealthConfig, metrics: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """Return the state after a step, with the parameters and moments from before it if the step is skipped.

    Args:
        old: State before the step.
        new: State after it, except for the statistics and the loss scale.
        config: Health policies.
        metrics: Metrics of the step.

    Returns:
        (state, metrics): with those of health and the loss scale added.
    """
    overflow = None
    if old.loss_scale:
        overflow = loss_scale.is_overflow(metrics["loss"], metrics["grad_norm"])
        grad_norm = loss_scale.without_nan(metrics["grad_norm"], overflow)
        metrics = metrics | {"grad_norm": grad_norm, "loss_scale": old.loss_scale.scale}
        new = new._replace(loss_scale=loss_scale.update(old.loss_scale, overflow, jnp.isfinite(metrics["loss"])))
    statistics, is_taken, diagnostics = health.update(
        old.health, config, metrics["loss"], metrics["grad_norm"], overflow
    )
    params, opt_state, average = health.select(
        is_taken, (new.params, new.opt_state, new.average), (old.params, old.opt_state, old.average)
    )
    new = new._replace(params=params, opt_state=opt_state, average=average, health=statistics)
    return new, metrics | diagnostics


def eval_step(weights: Any, batch: Batch, *, graph: nnx.GraphDef, objective: Objective = ops.LossWeights()) -> Sums:
    """Return the sums of an objective over a batch, without dropout and, by default, without additional terms."""
    return objective_sums(nnx.merge(graph, weights), batch, objective)


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
    """Bind the functions of this module to a config and compile them.

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
    train = functools.partial(train_step, config=config, graph=graph, optimizer=optimizer)
    evaluate = functools.partial(eval_step, graph=graph, objective=validation_objective(config.train))
    merge = functools.partial(nnx.merge, graph)
    # jax_debug_nans repeats a step that produced a NaN, for which it needs the state.
    donated = () if config.train.debug else 0
    if mesh is None:
        return Steps(jax.jit(init), jax.jit(train, donate_argnums=donated), jax.jit(evaluate), merge, partitions)
    shardings = sharding.tree_shardings(mesh, jax.eval_shape(init), partitions)
    replicated = sharding.replicated(mesh)
    train = functools.partial(train, param_shardings=shardings.params)
    return Steps(
        jax.jit(init, out_shardings=shardings),  # created where they belong: no device ever holds all of them
        jax.jit(
            in_mesh(train, mesh),
            donate_argnums=donated,
            out_shardings=(shardings, replicated),
            compiler_options=sharding.compiler_options(mesh) or None,
        ),
        jax.jit(in_mesh(evaluate, mesh), out_shardings=replicated),
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
