"""`scaling.png`: the loss over the size at each budget, the best sizes over the budget, and the law of the loss."""

from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.report.training_plot import save_figure
from slm_jax.scaling.prediction import Check, Fits, Prediction

_COLORS = "viridis"


def plot(path: Path, fits: Fits, prediction: Prediction | None, check: Check | None, metric: str) -> None:
    """Draw the results of a study.

    Args:
        path: The PNG file to write.
        fits: The fits.
        prediction: The prediction for a larger budget; None: none.
        check: The held-out run; None: none.
        metric: The name of the loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    parabolas, sizes, losses = figure.subplots(1, 3)
    _plot_parabolas(parabolas, fits, metric)
    _plot_best_sizes(sizes, fits, prediction)
    _plot_losses(losses, fits, prediction, check, metric)
    for panel in (parabolas, sizes, losses):
        panel.grid(alpha=0.3)
    save_figure(figure, path)


def _plot_parabolas(panel: Any, fits: Fits, metric: str) -> None:
    from matplotlib import colormaps

    budgets = np.unique(fits.points.budgets)
    colors = colormaps[_COLORS](np.linspace(0, 0.9, len(budgets)))
    for budget, color in zip(budgets, colors, strict=True):
        group = fits.points.of_budget(budget)
        panel.plot(group.parameters, group.losses, "o", color=color, label=f"{budget:.3g}", alpha=0.7)
        if (coefficients := fits.isoflop.parabolas.get(float(budget))) is not None:
            x = np.linspace(np.log(group.parameters.min()), np.log(group.parameters.max()), 100)
            panel.plot(np.exp(x), np.polyval(coefficients, x), color=color, linewidth=1)
    panel.plot([each.parameters for each in fits.isoflop.optima], [each.loss for each in fits.isoflop.optima], "k*")
    panel.set_xscale("log")
    panel.set_xlabel("parameters")
    panel.set_ylabel(metric)
    panel.legend(title="FLOPs", fontsize="small")


def _plot_best_sizes(panel: Any, fits: Fits, prediction: Prediction | None) -> None:
    budgets = np.array([each.flops for each in fits.isoflop.optima])
    panel.loglog(budgets, [each.parameters for each in fits.isoflop.optima], "o", label="best parameters")
    panel.loglog(budgets, [each.tokens for each in fits.isoflop.optima], "s", label="best tokens")
    if fits.isoflop.size is not None and fits.isoflop.tokens is not None:
        end = prediction.budget if prediction else budgets.max()
        x = np.geomspace(budgets.min(), end, 50)
        for law, color in ((fits.isoflop.size, "C0"), (fits.isoflop.tokens, "C1")):
            panel.loglog(x, law.coefficient * x**law.exponent, color=color, linewidth=1)
        if fits.isoflop.resampled_laws:
            for index, color in ((0, "C0"), (1, "C1")):
                values = [[both[index].at(each) for each in x] for both in fits.isoflop.resampled_laws]
                panel.fill_between(x, *np.percentile(values, [2.5, 97.5], axis=0), color=color, alpha=0.2)
    panel.set_xlabel("FLOPs")
    panel.legend(fontsize="small")


def _plot_losses(panel: Any, fits: Fits, prediction: Prediction | None, check: Check | None, metric: str) -> None:
    """Draw measured losses over those of the law."""
    panel.set_xlabel("law of the loss")
    panel.set_ylabel(metric)
    if fits.law is None:
        panel.text(0.5, 0.5, "too few runs for a law", ha="center", transform=panel.transAxes)
        return
    fitted = fits.law.law.loss(fits.points.parameters, fits.points.tokens)
    panel.plot(fitted, fits.points.losses, "o", alpha=0.6, label="runs")
    ends = [*fitted, *([prediction.loss.value] if prediction and prediction.loss else [])]
    panel.plot([min(ends), max(ends)], [min(ends), max(ends)], color="tab:gray", linewidth=1)
    if prediction and prediction.loss and prediction.loss.has_interval:
        loss = prediction.loss
        panel.errorbar(
            [loss.value],
            [loss.value],
            [[loss.value - loss.low], [loss.high - loss.value]],
            capsize=4,
            label="predicted",
        )
    if check is not None:
        panel.plot([check.predicted.value], [check.run.loss], "r*", markersize=12, label="held-out run")
    panel.legend(fontsize="small")
