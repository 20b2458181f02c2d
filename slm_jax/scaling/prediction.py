"""The results of a study: both fits, the prediction for a larger budget, and its check against a held-out run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slm_jax.scaling.collect import FinishedRun, finished_runs, points_of
from slm_jax.scaling.isoflop import IsoFlopFit, fit_isoflop
from slm_jax.scaling.law import NUM_FITTED, LawFit, fit_law
from slm_jax.scaling.missing import notes_of_missing
from slm_jax.scaling.points import Points, interval
from slm_jax.scaling.study import CHECK, MIN_SIZES, Study, size_setting
from slm_jax.sweep.plan import Trial
from slm_jax.sweep.run import run_trials

DRAWS = 200
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; the bounds are NaN where the runs are too few for one."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, value: float, resampled: Sequence[float] | np.ndarray) -> "Estimate":
        """Return a value with the interval of its resampled values."""
        return cls(float(value), *interval(np.asarray(resampled, np.float64)))

    @property
    def has_interval(self) -> bool:
        """True if the interval is known."""
        return math.isfinite(self.low)

    def holds(self, value: float) -> bool:
        """Return whether a value lies in the interval."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Fits:
    """Both fits of a study.

    Attributes:
        points: The runs.
        isoflop: Best sizes by budget.
        law: The law of the loss; None with too few settings.
    """

    points: Points
    isoflop: IsoFlopFit
    law: LawFit | None

    def size_exponent(self) -> Estimate | None:
        """Return the exponent of N*(C); None without two budgets with a minimum."""
        if self.isoflop.size is None:
            return None
        return Estimate.of(self.isoflop.size.exponent, [size.exponent for size, _ in self.isoflop.resampled_laws])

    def tokens_exponent(self) -> Estimate | None:
        """Return the exponent of D*(C); None without two budgets with a minimum."""
        if self.isoflop.tokens is None:
            return None
        return Estimate.of(self.isoflop.tokens.exponent, [each.exponent for _, each in self.isoflop.resampled_laws])

    def best_size(self, budget: float) -> Estimate | None:
        """Return N* at a budget by the power law; None without one."""
        if self.isoflop.size is None:
            return None
        return Estimate.of(self.isoflop.size.at(budget), [size.at(budget) for size, _ in self.isoflop.resampled_laws])

    def best_tokens(self, budget: float) -> Estimate | None:
        """Return D* at a budget by the power law; None without one."""
        if self.isoflop.tokens is None:
            return None
        return Estimate.of(self.isoflop.tokens.at(budget), [each.at(budget) for _, each in self.isoflop.resampled_laws])

    def loss(self, parameters: float, tokens: float) -> Estimate | None:
        """Return the loss of one new run with the interval that should hold it; None without a law."""
        if self.law is None:
            return None
        mean = float(self.law.law.loss(parameters, tokens))
        return Estimate.of(mean, self.law.predicted(parameters, tokens))


@dataclass(frozen=True)
class Prediction:
    """The model for a larger budget.

    Attributes:
        budget: FLOPs.
        best_size: N* by the power law.
        best_tokens: D* by the power law.
        trial: The nearest model that can be built, as a run.
        loss: Its loss; None without a law.
    """

    budget: float
    best_size: Estimate
    best_tokens: Estimate
    trial: Trial
    loss: Estimate | None


@dataclass(frozen=True)
class Check:
    """A held-out run against its prediction.

    Attributes:
        run: The held-out run.
        predicted: Its predicted loss, at its measured parameters and tokens.
    """

    run: FinishedRun
    predicted: Estimate

    @property
    def passed(self) -> bool:
        """True if the loss lies in the interval."""
        return self.predicted.holds(self.run.loss)


def can_fit(runs: Sequence[FinishedRun]) -> bool:
    """Return whether at least one budget has enough sizes for a parabola."""
    sizes: dict[float, set[int]] = {}
    for run in runs:
        sizes.setdefault(size_setting(run.trial).budget, set()).add(run.parameters)
    return any(len(each) >= MIN_SIZES for each in sizes.values())


def fit(runs: Sequence[FinishedRun], draws: int = DRAWS) -> Fits:
    """Fit both laws to the finished runs of a study.

    Budgets with runs of less than three sizes are left out of the parabolas.

    Args:
        runs: The finished runs; see `can_fit`.
        draws: Bootstrap samples.
    """
    points = points_of(runs)
    complete = [budget for budget in np.unique(points.budgets) if points.of_budget(budget).num_settings >= MIN_SIZES]
    isoflop = fit_isoflop(points.of_budgets(complete), draws)
    law = fit_law(points, draws) if points.num_settings > NUM_FITTED else None
    return Fits(points, isoflop, law)


def predict(fits: Fits, study: Study, budget: float, vocab_size: int, folder: Path) -> Prediction | None:
    """Predict the best model of a larger budget and its loss; None without a power law.

    Args:
        fits: The fits.
        study: The study, whose options the model has.
        budget: FLOPs.
        vocab_size: Entries of the tokenizer.
        folder: The folder of the study.

    Raises:
        UserError: No such model can be built.
    """
    size, tokens = fits.best_size(budget), fits.best_tokens(budget)
    if size is None or tokens is None:
        return None
    trial = study.trial(budget, size.value, vocab_size, folder / CHECK)
    setting = size_setting(trial)
    return Prediction(budget, size, tokens, trial, fits.loss(setting.parameters, setting.tokens))


def run_check(fits: Fits, prediction: Prediction, folder: Path, metric: str) -> tuple[Check | None, int | None]:
    """Train the predicted model, unless it is finished, and compare its loss with its interval.

    Args:
        fits: The fits, which the held-out run is not part of.
        prediction: The prediction.
        folder: The folder of the study.
        metric: The loss.

    Returns:
        The check, None if the run failed, was stopped, or has no interval; the signal that stopped it.
    """
    scores = run_trials([prediction.trial], folder, metric)
    for run in finished_runs([prediction.trial], scores):
        predicted = fits.loss(run.parameters, run.tokens)
        if predicted is not None and predicted.has_interval:
            return Check(run, predicted), None
    return None, scores.stopped_by


def notes(
    fits: Fits,
    runs: Sequence[FinishedRun],
    max_epochs: float,
    can_train: Callable[[float, float], bool] = lambda budget, size: True,
) -> list[str]:
    """Return what limits the conclusions, one sentence each.

    Args:
        fits: The fits.
        runs: The finished runs.
        max_epochs: Number of epochs from which a text counts as repeated.
        can_train: Returns whether there is a run of a budget and a size.
    """
    found = list(notes_of_missing(fits.points, fits.isoflop, can_train))
    if fits.isoflop.size is None:
        found.append(
            f"No power laws and no prediction: they need two budgets with a minimum between the sizes, there "
            f"{'is' if len(fits.isoflop.optima) == 1 else 'are'} {len(fits.isoflop.optima) or 'none'}."
        )
    if len(fits.isoflop.optima) == 2:
        found.append("A power law through two budgets always fits: give three --budgets or more.")
    if fits.law is None:
        found.append(f"No law of the loss: it needs more than {NUM_FITTED} combinations of size and budget.")
    elif not fits.law.resampled:
        found.append("No intervals: too few runs.")
    for name, exponent in fits.law.undetermined() if fits.law else ():
        found.append(f"The runs do not determine {name} of the law, whose fit ended at {exponent:.2g}.")
    if fits.isoflop.failed > 0:
        found.append(
            f"The intervals of the power laws leave out {fits.isoflop.failed:.0%} of the resampled losses, in which a "
            "budget has no minimum: they are too narrow."
        )
    repeated = [run for run in runs if run.epochs > max_epochs]
    if repeated:
        most = max(run.epochs for run in repeated)
        found.append(
            f"{len(repeated)} of {len(runs)} runs read the text more than {max_epochs:g} times (up to {most:.0f}), and "
            "learn less from a token than from fresh text: the laws hold for this text only (arXiv:2305.16264)."
        )
    off = [run for run in runs if abs(run.flops / size_setting(run.trial).budget - 1) > 0.05]
    if off:
        found.append(
            f"{len(off)} of {len(runs)} runs differ from their budget by more than 5 %: the tokenizer has another size "
            "than planned, or the steps are few."
        )
    return found
