"""Begin a run with the newest weights of another, or with those of a Hugging Face folder: fine-tuning, and the stages
of a curriculum.

    the other's config and tokenizer  ->  what does not fit is refused  ->  its weights, and its moments if asked

The state that comes of it is the new run's checkpoint of step 0, whole on disk before the first step: from then on the
run stands on its own, whatever becomes of the other, and ends with the same bits wherever it is killed.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from slm_jax.config.checks import weight_conflicts
from slm_jax.config.schema import Config, format_problems
from slm_jax.distributed import sharding
from slm_jax.huggingface.import_folder import Folder, folder_misfits, open_folder, read_parameters
from slm_jax.run.checkpoint import read_newest
from slm_jax.run.directory import Run, find_run
from slm_jax.training.schedule import is_schedule_state
from slm_jax.training.train_step import Steps, TrainState, make_steps
from slm_jax.utils.errors import UserError


class Origin(NamedTuple):
    """The run that another begins with."""

    run: Run
    config: Config

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.run.path


def find_origin(config: Config) -> Origin | Folder | None:
    """The run of `init.from_run` or the folder of `init.from_hf`, None without.

    Raises UserError with all that does not fit, both values named.
    """
    if config.init.from_hf:
        folder = open_folder(config.init.from_hf)
        if problems := list(folder_misfits(folder, config.model)):
            raise UserError(format_problems(f"this run cannot begin with the weights of {folder.path}", problems))
        return folder
    if not config.init.from_run:
        return None
    run = find_run(config.init.from_run, trained=True)
    origin = Origin(run, run.read_config())
    problems = list(weight_conflicts(config, origin.config))
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(
            f"this run cannot begin with the weights of {run.path}:{listed}\n"
            f"Give the same values, or take that run's own: --config {run.config}"
        )
    return origin


def first_state(
    config: Config, origin: Origin | Folder, steps: Steps, vocab_size: int, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state of step 0 with the origin's parameters, and with its optimizer's moments if they are carried.

    Step, random key and the schedule's count are the new run's own. Raises UserError without usable weights.
    """
    if isinstance(origin, Folder):
        state = steps.init()
        read = read_parameters(origin, state.params)
        # Each process gives the parts that its devices hold.
        put = lambda new, old: jax.make_array_from_callback(old.shape, old.sharding, lambda at: new[at])  # noqa: E731
        return state._replace(params=jax.tree.map(put, read, state.params))
    carried = config.init.optimizer == "keep"
    shapes = jax.eval_shape(make_steps(origin.config, vocab_size).init)
    target = sharding.abstract_arrays(mesh, shapes, steps.partitions)
    wanted = {"params": target.params} | ({"opt_state": target.opt_state} if carried else {})
    found, _ = read_newest(origin.run.checkpoints, wanted)
    state = steps.init()
    state = state._replace(params=found["params"])
    if carried:
        state = state._replace(opt_state=_carried(found["opt_state"], origin.config, state.opt_state, config))
    return state


def _carried(old: Any, old_config: Config, new: Any, new_config: Config) -> Any:
    """The new optimizer's state with the old one's moments; the schedule's count stays the new one's, 0."""

    def pick(mine: Any, theirs: Any) -> Any:
        return mine if is_schedule_state(mine) else theirs

    # Clipping, which has no state, comes first in the chain where there is any.
    theirs = old[1] if old_config.optimizer.clip else old
    mine = new[1] if new_config.optimizer.clip else new
    merged = jax.tree.map(pick, mine, theirs, is_leaf=is_schedule_state)
    return (new[0], merged) if new_config.optimizer.clip else merged
