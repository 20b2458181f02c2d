"""The finished runs of a study as points, read from their run directories, and the time that runs take."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slm_jax.performance.roofline import mfu_baseline
from slm_jax.report.run_data import ReportData, read_report_data
from slm_jax.scaling.points import Points
from slm_jax.scaling.study import size_setting
from slm_jax.sweep.plan import Trial
from slm_jax.sweep.run import Scores

_ASSUMED_MFU = 0.35  # of a run before any has been timed


@dataclass(frozen=True)
class FinishedRun:
    """Measured quantities of a run.

    Attributes:
        trial: The run.
        parameters: Parameters of the model.
        tokens: Predicted tokens.
        flops: Model FLOPs.
        seconds: Training time, validation included.
        epochs: How often the text was read.
        loss: The score.
    """

    trial: Trial
    parameters: int
    tokens: float
    flops: float
    seconds: float
    epochs: float
    loss: float


def finished_runs(trials: Sequence[Trial], scores: Scores) -> list[FinishedRun]:
    """Return the runs that have a finite score, in the order of the trials."""
    return [
        _finished(trial, read_report_data(trial.run), scores.values[trial.run.name])
        for trial in trials
        if math.isfinite(scores.values.get(trial.run.name, math.inf))
    ]


def _finished(trial: Trial, data: ReportData, loss: float) -> FinishedRun:
    end = data.columns.end
    text = sum(manifest["train"]["tokens"] for manifest in data.last.manifests)
    epochs = end["tokens"] / text if text else math.nan
    return FinishedRun(trial, data.last.num_parameters, end["tokens"], end["flops"], end["seconds"], epochs, loss)


def points_of(runs: Sequence[FinishedRun]) -> Points:
    """Return runs as arrays."""
    settings = {name: number for number, name in enumerate(dict.fromkeys(run.trial.setting.folder for run in runs))}
    rows = [
        (
            size_setting(run.trial).budget,
            run.parameters,
            run.tokens,
            run.flops,
            run.loss,
            settings[run.trial.setting.folder],
        )
        for run in runs
    ]
    budgets, parameters, tokens, flops, losses, numbers = np.array(rows, np.float64).T
    return Points(budgets, parameters, tokens, flops, losses, numbers.astype(int))


def expected_seconds(trials: Sequence[Trial], finished: Sequence[FinishedRun]) -> tuple[list[float], str]:
    """Return how long runs will take, without compilation, and the source of the estimate.

    The speed is that of the finished run of the nearest size, or a share of the device's peak.
    """
    if finished:
        rates = {run.parameters: run.flops / max(run.seconds, 1e-9) for run in finished}
        seconds = []
        for trial in trials:
            setting = size_setting(trial)
            nearest = min(rates, key=lambda size: abs(math.log(size / setting.parameters)))
            seconds.append(setting.flops / rates[nearest])
        return seconds, "from the speed of the finished runs"
    from slm_jax.distributed.sharding import make_mesh

    config = trials[-1].config
    baseline = mfu_baseline(config, config.tokenizer.vocab_size, make_mesh(config))
    rate = _ASSUMED_MFU * baseline.flops
    return (
        [size_setting(trial).flops / rate for trial in trials],
        f"at an assumed MFU of {_ASSUMED_MFU:.0%} of {baseline.text}",
    )
