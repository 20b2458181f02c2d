"""Warm start: begin a run with the weights of another run or of a Hugging Face folder.

Used for fine-tuning and for the stages of a curriculum. The config and tokenizer of the source are read and compared
first; then its weights (of the checkpoint that `run.selection` chooses) become the state of step 0, with its optimizer
state if `init.optimizer` is `keep`. That state is saved as the new run's first checkpoint. From then on the new run
does not depend on its source, and ends with the same bits wherever it is interrupted.
"""

import logging
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from slm_jax.config.finetuning import describe_fine_tuning
from slm_jax.config.schema import Config, ModelConfig, format_problems
from slm_jax.config.weight_conflicts import changed_function, weight_conflicts
from slm_jax.distributed import agreement, multihost, sharding
from slm_jax.huggingface.import_folder import Folder, check_size, folder_misfits, open_folder, read_parameters
from slm_jax.huggingface.peft_folder import check_adapters, read_adapters
from slm_jax.model import lora_merge
from slm_jax.model.abstract import abstract_model
from slm_jax.run.directory import Run, find_run
from slm_jax.run.frozen import read_merged
from slm_jax.run.read_checkpoint import read_fields
from slm_jax.run.selection import Selection, select_checkpoint
from slm_jax.training.options import averaging
from slm_jax.training.schedule import is_schedule_state
from slm_jax.training.steps import Steps, make_steps
from slm_jax.training.train_step import TrainState
from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)


class SourceRun(NamedTuple):
    """The run whose weights a new run starts with.

    Attributes:
        run: The run directory.
        config: Its config.
    """

    run: Run
    config: Config

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.run.path


def find_initial_weights(config: Config) -> SourceRun | Folder | None:
    """Find the run of `init.from_run` or the folder of `init.from_hf`, and check that its weights fit.

    Returns:
        The run or the folder; None for random weights.

    Raises:
        UserError: It does not exist, or does not fit the config; all differing options are named.
    """
    if config.lora.from_peft:
        check_adapters(config.lora.from_peft, config.lora)
    if config.init.from_hf:
        folder = open_folder(config.init.from_hf)
        check_size(folder)
        if problems := list(folder_misfits(folder, config.model)):
            raise UserError(format_problems(f"this run cannot start with the weights of {folder.path}", problems))
        _warn_of_changed_function(config, ModelConfig(**folder.model), folder.path)
        logger.info(describe_fine_tuning(config.optimizer, config.train, config.lora, config.model.dim))
        return folder
    if not config.init.from_run:
        if config.lora.rank:
            raise UserError(
                f"lora.rank {config.lora.rank} trains adapters of existing weights: give --init.from_run or "
                "--init.from_hf, or --lora.rank 0 to train all parameters"
            )
        if config.train.objective == "dpo":
            raise UserError(
                "train.objective dpo compares with the model that training starts from: give --init.from_run or "
                "--init.from_hf, a model that was trained on conversations"
            )
        return None
    # The newest run, or the newest stage of a curriculum, as the first process sees them.
    path = agreement.from_first("initial weights", lambda: str(find_run(config.init.from_run, trained=True).path))
    run = Run(Path(path))
    source = SourceRun(run, run.read_config())
    if problems := list(weight_conflicts(config, source.config)):
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(
            f"this run cannot start with the weights of {run.path}:{listed}\n"
            f"Give the same values, or use those of that run: --config {run.config}"
        )
    _warn_of_changed_function(config, source.config.model, run.path)
    if config.lora.rank or config.train.objective == "dpo":
        logger.info(describe_fine_tuning(config.optimizer, config.train, config.lora, config.model.dim))
    return source


def _warn_of_changed_function(config: Config, trained_as: ModelConfig, path: Path) -> None:
    """Warn if the model of a config is not the function that the weights were trained as."""
    changes = changed_function(config.model, trained_as)
    if changes and multihost.is_first():
        logger.warning(
            "these options change what the weights of %s compute: %s. The loss starts higher; remove them unless this "
            "is intended",
            path,
            changes,
        )


def initial_state(
    config: Config, source: SourceRun | Folder, steps: Steps, vocab_size: int, mesh: jax.sharding.Mesh
) -> tuple[TrainState, Any]:
    """Return the state of step 0 with the weights of a source.

    Step, random key and the position in the learning-rate schedule are those of the new run.

    Args:
        config: The config of the new run.
        source: What `find_initial_weights` returned.
        steps: The functions of the new run.
        vocab_size: The number of ids of its tokenizer.
        mesh: Its devices.

    Returns:
        The state, and the weights in float32; with LoRA they are the frozen base of the state.

    Raises:
        UserError: The source has no usable weights.
    """
    _, shapes = abstract_model(config, vocab_size)
    target = sharding.abstract_arrays(mesh, shapes, steps.partitions)
    state = steps.init()
    dtypes = jax.tree.map(lambda x: x.dtype, state.base)
    # Free the random weights first, which those that are read replace: large models do not fit twice.
    state = state._replace(base=()) if config.lora.rank else state._replace(params=())
    if isinstance(source, Folder):
        logger.info("initial weights: %s", source.path)
        params = _folder_weights(target, source, vocab_size)
    elif config.init.optimizer == "keep":
        params, opt_state = _with_optimizer_state(source, target, vocab_size, mesh)
        kept = _kept_optimizer_state(opt_state, source.config, state.opt_state, config)
        state = state._replace(opt_state=kept)
    else:
        selection = _selection(source)
        params, step = read_merged(source.run.checkpoints, source.config, target, steps=selection.candidates)
        logger.info("initial weights: run %s, %s", source.path, selection.describe(step))
    if not config.lora.rank:
        return _with_average(state._replace(params=params)), params
    state = state._replace(base=jax.tree.map(lambda new, dtype: new.astype(dtype), params, dtypes))
    if config.lora.from_peft:
        logger.info("initial adapters: %s", config.lora.from_peft)
        state = state._replace(params=_folder_adapters(config, state.params))
    logger.info(lora_merge.describe(config.lora, state.base, state.params))
    return _with_average(state), params


def _with_average(state: TrainState) -> TrainState:
    """Return the state with the average, if it has one, at its parameters."""
    if not state.average:
        return state
    shardings = jax.tree.map(lambda x: x.sharding, state.average)
    return state._replace(average=jax.jit(averaging.init, out_shardings=shardings)(state.params))


def _selection(source: SourceRun) -> Selection:
    """Return the checkpoints of a run that its weights are read from, as the first process sees them."""
    return Selection(**agreement.from_first("initial checkpoint", lambda: asdict(select_checkpoint(source.run))))


def _with_optimizer_state(source: SourceRun, params: Any, vocab_size: int, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Return parameters and optimizer state of one checkpoint of a run."""
    steps = make_steps(source.config, vocab_size)
    target = sharding.abstract_arrays(mesh, jax.eval_shape(steps.init), steps.partitions)
    wanted = {"params": params, "opt_state": target.opt_state}
    selection = _selection(source)
    saved, step = read_fields(source.run.checkpoints, wanted, selection.candidates)
    logger.info("initial weights: run %s, %s", source.path, selection.describe(step))
    return saved["params"], saved["opt_state"]


def _folder_weights(target: Any, folder: Folder, vocab_size: int) -> Any:
    """Return the parameters of a folder; each process puts the parts that its devices hold."""
    return _put(read_parameters(folder, target, vocab_size), target, f"the weights of {folder.path}")


def _folder_adapters(config: Config, adapters: Any) -> Any:
    """Return the adapters of the folder `lora.from_peft`, sharded like those of a state."""
    values = read_adapters(config.lora.from_peft, config.lora, adapters)
    return _put(values, adapters, f"the adapters of {config.lora.from_peft}")


def _put(values: Any, target: Any, description: str) -> Any:
    """Put arrays, which must be the same on all hosts, onto the devices."""
    agreement.require_same(description, lambda: _checksums(values), "give all hosts the same folder")

    def put(value: Any, like: Any) -> jax.Array:
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])

    return jax.tree.map(put, values, target)


def _checksums(values: Any) -> dict[str, str]:
    """Return the CRC-32 of each array, which detects that hosts have different copies of a folder."""
    leaves = jax.tree_util.tree_leaves_with_path(values)
    return {jax.tree_util.keystr(path): f"{zlib.crc32(np.ascontiguousarray(leaf).data):08x}" for path, leaf in leaves}


def _kept_optimizer_state(saved: Any, saved_config: Config, new: Any, new_config: Config) -> Any:
    """Return the saved optimizer state with the new run's position in the schedule, 0."""

    def pick(new_leaf: Any, saved_leaf: Any) -> Any:
        return new_leaf if is_schedule_state(new_leaf) else saved_leaf

    # With clipping, whose state is empty, the optimizer is the second link of a chain.
    saved_optimizer = saved[1] if saved_config.optimizer.clip else saved
    new_optimizer = new[1] if new_config.optimizer.clip else new
    merged = jax.tree.map(pick, new_optimizer, saved_optimizer, is_leaf=is_schedule_state)
    return (new[0], merged) if new_config.optimizer.clip else merged
