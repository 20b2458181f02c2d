"""Resume a run from its newest checkpoint, and refuse one of another text, tokenizer or config."""

import json
from typing import Any, NamedTuple

import jax

from slm_jax.config.schema import Config
from slm_jax.distributed import sharding
from slm_jax.run.checkpoint import Checkpoints
from slm_jax.run.directory import other_input_error
from slm_jax.run.frozen import read_base
from slm_jax.run.restore import restore_newest
from slm_jax.run.trend import Trend
from slm_jax.training import health
from slm_jax.training.options import loss_scale
from slm_jax.training.steps import Steps
from slm_jax.training.train_step import TrainState
from slm_jax.utils.errors import UserError

_BINDING = (
    "model.",
    "lora.",
    "optimizer.",
    "train.",
    "data.mode",
)  # what a training state depends on, unless `resumable`
# Options of a state's meaning that earlier versions did not have, and so did not store.
_ADDED = {
    "train.objective": "next-token",
    "lora.rank": 0,
    "model.window_pattern": "",
    "model.mlp": "swiglu",
    "model.logit_softcap": 0.0,
    "model.attention_gate": False,
    "model.value_embeddings": [],
    "model.residual_scales": False,
    "optimizer.embedding_lr_scale": 1.0,
    "optimizer.head_lr_scale": 1.0,
    "optimizer.vector_lr_scale": 1.0,
    "optimizer.average_decay": 0.0,
    "optimizer.cautious_decay": False,
    "optimizer.orthogonalization": "newton-schulz",
    "optimizer.momentum": 0.95,
    "optimizer.momentum_warmup_steps": 0,
    "optimizer.momentum_cooldown_steps": 0,
}
_INPUTS = {
    "tokenizer": "another tokenizer",
    "corpus": "another text",
    "pairs": "other preference pairs",
    "seed": "another seed",
}
_OPTIONAL = {"health": health.init, "loss_scale": loss_scale.init}  # fields that a state has or not, and their start


def compatibility(config: Config, steps: Steps, corpus: str, tokenizer: str, pairs: str = "") -> dict[str, Any]:
    """Return what the training states of a run depend on, as JSON values: stored with each checkpoint.

    Args:
        config: The config.
        steps: The functions of the run.
        corpus: Fingerprint of the corpus.
        tokenizer: Fingerprint of the tokenizer.
        pairs: Fingerprint of the preference pairs of a DPO run, whose corpus holds the chosen conversations only.
    """
    state = jax.eval_shape(steps.init)
    return {
        "seed": config.train.seed,
        "corpus": corpus,
        "tokenizer": tokenizer,
        "health": bool(state.health),  # whether the state has statistics of the loss
        "loss_scale": bool(state.loss_scale),
        "config": json.loads(json.dumps(config.flat())),
        **({"pairs": pairs} if pairs else {}),
    }


def check_compatibility(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Check that the options and data of a checkpoint allow training to continue with the current ones.

    Args:
        saved: `compatibility` of the checkpoint, and its `step`. Earlier versions stored fewer entries.
        current: `compatibility` of this call.

    Raises:
        UserError: They differ in more than options that may change on resume.
    """
    for name, other in _INPUTS.items():
        if name in saved and name in current and saved[name] != current[name]:
            raise other_input_error(saved["step"], other, saved[name], current[name])
    resumable = Config.fields_with("resumable")
    for name, value in {**_ADDED, **saved.get("config", {})}.items():
        if name in resumable or name == "lora.from_peft" or not name.startswith(_BINDING):  # read once, at the start
            continue
        if value != current["config"].get(name, value):
            raise UserError(
                f"the checkpoint of step {saved['step']} has another config: {name} is {value!r} saved, "
                f"{current['config'][name]!r} current. Give the same value, or start another --run"
            )


class Restored(NamedTuple):
    """The state that a run continues with.

    Attributes:
        state: The training state; None without a checkpoint.
        start: The number of steps taken.
        trend: The validations up to then; None if the checkpoint stores none (none at all, or an earlier version).
    """

    state: TrainState | None
    start: int
    trend: Trend | None


def restore(checkpoints: Checkpoints, steps: Steps, mesh: jax.sharding.Mesh, current: dict[str, Any]) -> Restored:
    """Restore the newest valid checkpoint of a run onto the devices of this call.

    Args:
        checkpoints: The checkpoints of the run.
        steps: The functions of the run.
        mesh: The devices; they may be others than those that the checkpoint was saved on.
        current: `compatibility` of this call.

    Raises:
        UserError: All checkpoints are corrupt, or the newest valid one is not compatible.
    """

    def target(position: dict[str, Any]) -> Any:
        check_compatibility(position, current)
        # Earlier versions stored neither the loss scale nor whether there is one.
        saved = {name: jax.eval_shape(init) if position.get(name) else () for name, init in _OPTIONAL.items()}
        shapes = TrainState(**jax.eval_shape(steps.init)._asdict() | saved).saved_fields()
        return sharding.abstract_arrays(mesh, shapes, steps.partitions)

    restored = restore_newest(checkpoints, target)
    if restored is None:
        return Restored(None, 0, None)
    fields, position = restored
    state = TrainState(**fields)
    if base := jax.eval_shape(steps.init).base:
        state = state._replace(
            base=read_base(checkpoints.folder, sharding.abstract_arrays(mesh, base, steps.partitions))
        )
    for name, init in _OPTIONAL.items():
        if current[name] != bool(getattr(state, name)):  # other options of `health`, or another compute dtype
            # Compiled: its arrays do not share memory, which a step could not donate twice.
            value = jax.jit(init, out_shardings=sharding.replicated(mesh))() if current[name] else ()
            state = TrainState(**state._asdict() | {name: value})
    trend = Trend.from_json(position["validation"]) if "validation" in position else None
    return Restored(state, position["step"], trend)
