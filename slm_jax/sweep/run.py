"""Run the trials of a sweep, one after another; each is an ordinary run, resumed where it was interrupted."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slm_jax.run.directory import Run
from slm_jax.run.metrics import read_metrics
from slm_jax.sweep.plan import Trial
from slm_jax.utils.errors import TrainingError, UserError
from slm_jax.utils.files import replace_text

logger = logging.getLogger(__name__)

FAILURES = "failures.json"


@dataclass
class Scores:
    """Results of the trials of a sweep.

    Attributes:
        values: The score of each finished trial, by the name of its run directory.
        failures: The error that ended a trial, by the name of its run directory.
        stopped_by: The signal that ended the sweep; None: all trials have ended.
    """

    values: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    stopped_by: int | None = None


def run_trials(trials: Sequence[Trial], folder: Path, metric: str) -> Scores:
    """Train every trial that is not finished.

    A trial that diverges or needs too much memory is recorded and not repeated; the others go on.

    Args:
        trials: The trials, in the order in which they are trained.
        folder: The folder of the sweep.
        metric: The key of `metrics.jsonl` that is the score.

    Returns:
        The scores of all finished trials.

    Raises:
        UserError: Another error, whose cause may be common to all trials, such as a missing text or a full disk.
    """
    from slm_jax.training.train import train  # imports JAX: invalid settings are reported without waiting for it

    scores = Scores(failures=read_failures(folder))
    for number, trial in enumerate(trials, start=1):
        name = trial.run.name
        value = finished_score(trial, metric)
        if value is None and name not in scores.failures:
            logger.info(
                "\ntrial %d of %d: %s, seed %d", number, len(trials), trial.setting.label, trial.config.train.seed
            )
            try:
                result = train(trial.config, trial.run)
            except TrainingError as error:
                logger.warning("%s: %s", name, error)
                scores.failures[name] = str(error)
                replace_text(folder / FAILURES, json.dumps(scores.failures, indent=2, ensure_ascii=False) + "\n")
                continue
            if result.stopped_by is not None:
                scores.stopped_by = result.stopped_by
                return scores
            value = last_score(trial.run, metric)
            _free_programs(trials, number)
        if value is not None:
            scores.values[name] = value
    return scores


def _free_programs(trials: Sequence[Trial], number: int) -> None:
    """Free compiled programs before the next setting: a sweep of many shapes would collect them all in memory."""
    if number < len(trials) and trials[number].setting != trials[number - 1].setting:
        import jax

        jax.clear_caches()


def finished_score(trial: Trial, metric: str) -> float | None:
    """Return the score of a trial that has saved its last step; None if it has not, or has not been started.

    The last step is `train.steps`, or that at which `train.stop_early` ended the trial.
    """
    from slm_jax.run.selection import newest_trend  # imports JAX

    if not trial.run.is_dir():
        return None
    # Metrics of the last step may be written although a kill has prevented its checkpoint.
    run = Run(trial.run)
    step = run.newest_step()
    if step is None:
        return None
    train = trial.config.train
    if step < train.steps and not (train.stop_early and newest_trend(run).is_over(train.stop_early)):
        return None
    return last_score(trial.run, metric)


def finished_scores(trials: Sequence[Trial], folder: Path, metric: str) -> Scores:
    """Return the scores of the trials that are finished, and train none.

    Raises:
        UserError: A finished trial has no such metric.
    """
    values = {trial.run.name: value for trial in trials if (value := finished_score(trial, metric)) is not None}
    return Scores(values, read_failures(folder))


def last_score(run: Path, metric: str) -> float:
    """Return the newest value of a metric.

    Raises:
        UserError: No row has it.
    """
    rows = read_metrics(Run(run).metrics, quiet=True)
    values = [row[metric] for row in rows if isinstance(row.get(metric), int | float)]
    if not values:
        names = sorted({name for row in rows for name, value in row.items() if isinstance(value, float)})
        raise UserError(f"{run} has no {metric} (--metric); it has {', '.join(names)}")
    return float(values[-1]) if math.isfinite(values[-1]) else math.inf


def read_failures(folder: Path) -> dict[str, str]:
    """Return the recorded errors by name of the run directory.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / FAILURES
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(text) for name, text in content.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and failed trials are tried again") from None
