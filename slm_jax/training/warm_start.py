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

from slm_jax.config.checks import weight_conflicts
from slm_jax.config.finetuning import describe_fine_tuning
from slm_jax.config.schema import Config, format_problems
from slm_jax.distributed import agreement, sharding
from slm_jax.huggingface.import_folder import Folder, check_size, folder_misfits, open_folder, read_parameters
from slm_jax.run.directory import Run, find_run
from slm_jax.run.read_checkpoint import read_fields
from slm_jax.run.selection import Selection, select_checkpoint
from slm_jax.training.schedule import is_schedule_state
from slm_jax.training.train_step import Steps, TrainState, make_steps
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
    if config.init.from_hf:
        folder = open_folder(config.init.from_hf)
        check_size(folder)
        if problems := list(folder_misfits(folder, config.model)):
            raise UserError(format_problems(f"this run cannot start with the weights of {folder.path}", problems))
        logger.info(describe_fine_tuning(config.optimizer, config.train))
        return folder
    if not config.init.from_run:
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
    return source


def initial_state(
    config: Config, source: SourceRun | Folder, steps: Steps, vocab_size: int, mesh: jax.sharding.Mesh
) -> TrainState:
    """Return the state of step 0 with the weights of a source.

    Step, random key and the position in the learning-rate schedule are those of the new run.

    Args:
        config: The config of the new run.
        source: What `find_initial_weights` returned.
        steps: The functions of the new run.
        vocab_size: The number of ids of its tokenizer.
        mesh: Its devices.

    Raises:
        UserError: The source has no usable weights.
    """
    if isinstance(source, Folder):
        logger.info("initial weights: %s", source.path)
        return _with_folder_weights(steps.init(), source, vocab_size)
    keeps_optimizer = config.init.optimizer == "keep"
    shapes = jax.eval_shape(make_steps(source.config, vocab_size).init)
    target = sharding.abstract_arrays(mesh, shapes, steps.partitions)
    wanted = {"params": target.params}
    if keeps_optimizer:
        wanted["opt_state"] = target.opt_state
    selection = Selection(**agreement.from_first("initial checkpoint", lambda: asdict(select_checkpoint(source.run))))
    saved, step = read_fields(source.run.checkpoints, wanted, selection.candidates)
    logger.info("initial weights: run %s, %s", source.path, selection.describe(step))
    state = steps.init()
    state = state._replace(params=saved["params"])
    if keeps_optimizer:
        opt_state = _kept_optimizer_state(saved["opt_state"], source.config, state.opt_state, config)
        state = state._replace(opt_state=opt_state)
    return state


def _with_folder_weights(state: TrainState, folder: Folder, vocab_size: int) -> TrainState:
    """Return a state with the parameters of a folder; each process puts the parts that its devices hold."""
    values = read_parameters(folder, state.params, vocab_size)
    agreement.require_same(
        f"the weights of {folder.path}", lambda: _checksums(values), "give all hosts the same folder"
    )

    def put(value: Any, old: jax.Array) -> jax.Array:
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: value[index])

    return state._replace(params=jax.tree.map(put, values, state.params))


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
