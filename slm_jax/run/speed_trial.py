"""`trial.json` of a run: the number of steps that a speed trial chose for `train.minutes`, and its times."""

import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

from slm_jax.config.schema import Config
from slm_jax.distributed import agreement
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import replace_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpeedTrial:
    """Result of a speed trial.

    Attributes:
        minutes: `train.minutes`.
        steps: The steps that were chosen.
        timed_steps: Steps that were timed.
        step_seconds: Seconds of a step.
        validation_seconds: Seconds of a validation with its samples, without compilation.
        first_validation_seconds: Seconds of the first one, which compiles.
        save_seconds: Seconds of a checkpoint.
        tasks_seconds: Seconds of scoring `eval.tasks`, without compilation.
        compile_seconds: Seconds that are spent again before the first step: compiling it, the initial state, and the
            peak of the device.
        preparation_seconds: Seconds from the start of the command, or of the call of `train`, to that of the trial.
        seconds_before: Seconds from there to the end of the trial.
    """

    minutes: float
    steps: int
    timed_steps: int
    step_seconds: float
    validation_seconds: float
    first_validation_seconds: float
    save_seconds: float
    tasks_seconds: float
    compile_seconds: float
    preparation_seconds: float
    seconds_before: float


def write_trial(run: Run, trial: SpeedTrial) -> None:
    """Write the file; from then on the run has these steps."""
    replace_text(run.trial, json.dumps(asdict(trial), indent=1) + "\n")


def read_trial(run: Run) -> SpeedTrial | None:
    """Return the trial of a run; None if there was none.

    Raises:
        UserError: The file is damaged.
    """
    if not run.trial.is_file():
        return None
    try:
        return SpeedTrial(**json.loads(run.trial.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{run.trial} is damaged ({error}): give the steps of the run, --train.steps N") from None


def with_steps(config: Config, steps: int) -> Config:
    """Return a config with another number of steps."""
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def with_steps_of_trial(config: Config, run: Run) -> tuple[Config, bool]:
    """Return the config with the steps that an earlier call chose for `train.minutes`, and whether a trial is needed.

    Args:
        config: The options of this call.
        run: The run directory.

    Raises:
        UserError: The run has taken steps, but no trial chose their number.
    """
    if not config.train.minutes:
        return config, False

    def read() -> dict[str, Any]:
        trial = read_trial(run)
        return {"trial": asdict(trial) if trial else None, "step": run.newest_step()}

    known = agreement.from_first("speed trial", read)
    if trial := known["trial"]:
        if trial["minutes"] != config.train.minutes:
            logger.info(
                "note: this run has the %d steps that train.minutes %g chose; train.minutes %g does not change them, "
                "--train.steps does",
                trial["steps"],
                trial["minutes"],
                config.train.minutes,
            )
        return with_steps(config, trial["steps"]), False
    if known["step"]:
        raise UserError(
            f"train.minutes {config.train.minutes:g} chooses the steps of a new run, but {known['step']} steps of "
            f"{run.path} are done: give --train.steps"
        )
    return config, True
