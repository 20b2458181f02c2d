"""The pure train and evaluation steps: functions of arrays and static arguments, which `steps.make_steps` compiles.

A step takes the gradient of an objective, updates the parameters and returns metrics. Frozen weights and the loss scale
are optional arguments; skipped updates, averages and norms of layers are `StepOption`s (options/).

Shapes: B sequences of the global batch, T tokens, D dim, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from slm_jax.config.schema import Config
from slm_jax.model.dropout import example_keys
from slm_jax.model.params import join
from slm_jax.training.context import count_input_tokens, layers_mean_context
from slm_jax.training.objective import Objective
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
        loss_scale: `options.loss_scale.LossScale`; () unless the compute dtype is float16.
        base: With LoRA the frozen parameters, see `lora.freeze`; () without.
        average: The average of `params` over the steps, see `options.averaging`; () unless `optimizer.average_decay` is
            set.
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
        return join(self.base, self.params) if self.base else self.params

    @property
    def evaluated_weights(self) -> Any:
        """The weights that are validated, sampled and loaded later: the average if there is one."""
        return self._replace(params=self.average["params"]).weights if self.average else self.weights

    def saved_fields(self) -> dict[str, Any]:
        """Return the fields that a checkpoint holds: all that are not empty, without the frozen parameters."""
        return {name: value for name, value in self._asdict().items() if name != "base" and not _is_empty(value)}


class Outcome(NamedTuple):
    """One step, as its options see and change it.

    Attributes:
        state: The state after the step.
        metrics: Scalars on the device, by name.
        grads: The gradient.
        updates: What the optimizer added to the parameters.
    """

    state: TrainState
    metrics: dict[str, Any]
    grads: Any
    updates: Any


StepOption = Callable[[TrainState, Outcome], Outcome]
"""Function of the state before a step and its outcome that returns another outcome; a part of the compiled step."""


def _is_empty(field: Any) -> bool:
    return isinstance(field, tuple) and not field


def loss_fn(
    params: Any,
    batch: Batch,
    key: jax.Array | None,
    *,
    graph: nnx.GraphDef,
    objective: Objective,
    scale: jax.Array | None = None,
    base: Any = (),
) -> tuple[jax.Array, Any]:
    """Return the loss summed over the predicted positions, times a scale, and all sums, not scaled.

    Args:
        params: Pure dict of parameters.
        batch: int32 arrays [B, T].
        key: Key of the dropout masks, or the keys of the rows, [B]; None disables dropout.
        graph: Graph of the model, from `abstract_model`.
        objective: The objective.
        scale: Factor of the loss, see `options.loss_scale`; None: 1.
        base: With LoRA the frozen parameters; params are the adapters then.
    """
    sums = objective.sums(nnx.merge(graph, join(base, params) if base else params), batch, key)
    return sums.loss if scale is None else scale * sums.loss, sums


def gradients(
    params: Any,
    batch: Batch,
    key: jax.Array | None,
    *,
    graph: nnx.GraphDef,
    objective: Objective,
    grad_accum_steps: int = 1,
    scale: jax.Array | None = None,
    base: Any = (),
) -> tuple[Any, Any]:
    """Return the gradient of the loss, averaged over the predicted positions (or pairs) of the batch, and the sums.

    The sums of all microbatches are accumulated before one division by the number of predicted positions, so that a
    microbatch with fewer of them weighs less, as it does in one large batch.

    Args:
        params: Pure dict of parameters.
        batch: int32 arrays [B, T].
        key: Key of the dropout masks; None disables dropout. The masks of an example are derived from it and the
            example's index in the batch, so that they are the same in every microbatch.
        graph: Graph of the model.
        objective: The objective.
        grad_accum_steps: Microbatches that the batch is computed in, one after the other; divides B.
        scale: Factor of the loss that is differentiated, which the gradient is divided by again; None: 1.
        base: With LoRA the frozen parameters.
    """
    loss = functools.partial(loss_fn, graph=graph, objective=objective, scale=scale, base=base)
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
        zeros = jax.tree.map(jnp.zeros_like, (params, objective.zero_sums()))
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
    objective: Objective,
    options: Sequence[StepOption],
    param_shardings: Any = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Take one optimizer step.

    Args:
        state: State before the step.
        batch: int32 arrays [B, T], the global batch.
        config: Dropout, accumulation and schedule.
        graph: Graph of the model, from `abstract_model`.
        optimizer: The transformation that made `state.opt_state`.
        objective: The objective.
        options: Applied to the outcome one after the other.
        param_shardings: Sharding of each parameter; None on one device.

    Returns:
        (state, metrics): the metrics are scalars on the device, except for those that an option adds.
    """
    key = jax.random.fold_in(state.key, state.step) if config.model.dropout else None
    grads, sums = gradients(
        state.params,
        batch,
        key,
        graph=graph,
        objective=objective,
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
    outcome = Outcome(updated, metrics, grads, updates)
    for option in options:
        outcome = option(state, outcome)
    metrics = outcome.metrics | {"param_norm": optax.tree.norm(outcome.state.params), "tokens": sums.tokens}
    batch = objective.sequences(batch)
    metrics["input_tokens"] = count_input_tokens(batch)
    if "attention_mask" in batch or "segment_ids" in batch:
        metrics["mean_context"] = layers_mean_context(batch, config.model.layer_windows)
    return outcome.state, metrics


def eval_step(weights: Any, batch: Batch, *, graph: nnx.GraphDef, objective: Objective) -> Any:
    """Return the sums of an objective over a batch, without dropout."""
    return objective.sums(nnx.merge(graph, weights), batch)
