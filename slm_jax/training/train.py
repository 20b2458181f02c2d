"""Raw text to a trained model: `python -m slm_jax.train`, or `train(config)`.

    run directory  ->  tokenizer and corpus  ->  model and steps  ->  restore  ->  loop  ->  report

Each of these is done once and found again: the same command on a run that was stopped, or killed at any instant,
goes on where it was and ends with the same numbers.
"""

import contextlib
import shutil
import sys
from pathlib import Path

from slm_jax.config.schema import Config
from slm_jax.distributed import multihost
from slm_jax.run.directory import Result, Run, new_run
from slm_jax.utils.errors import UserError


def train(config: Config, run: str | Path | None = None) -> Result:
    """Train, or continue, the run at a path (default: a fresh one in `runs/`). Raises UserError.

    SIGINT and SIGTERM end it after the step in hand, saved; a second one ends it at once.
    """
    config = _with_absolute_folder(config)
    per_host = Config.fields_with("per_host")
    multihost.require_same_options({k: v for k, v in config.flat().items() if k not in per_host})
    place = Run(Path(multihost.broadcast_from_first(lambda: str(run or new_run(config).path))))
    fresh, first = not place.exists() and not place.path.exists(), multihost.is_first()
    if first:
        print(f"run: {place.path}", file=sys.stderr)
    with place.lock(config.checkpoint.folder) if first else contextlib.nullcontext():
        try:
            multihost.broadcast_from_first(lambda: place.begin(config))
            if not place.exists():
                raise UserError(f"{place.path.absolute()} is not there: all processes must see the same file system")
            # JAX is imported late: a wrong option is told at once.
            from slm_jax.training.loop import run_training

            return run_training(config, place)
        except BaseException:
            if first and fresh and not place.corpus.is_dir():  # nothing came of it: leave no trace
                shutil.rmtree(place.path, ignore_errors=True)
            raise


def _with_absolute_folder(config: Config) -> Config:
    """The config with a `checkpoint.folder` that is the same one from wherever the run goes on."""
    folder = config.checkpoint.folder
    if not folder or "://" in folder:
        return config
    section = config.checkpoint.model_copy(update={"folder": str(Path(folder).expanduser().absolute())})
    return config.model_copy(update={"checkpoint": section})
