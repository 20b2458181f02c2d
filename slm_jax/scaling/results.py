"""Results of a study as a table, a CSV file and a JSON file; none of them depends on the time that runs took."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slm_jax.report.axes import format_compact
from slm_jax.scaling.collect import FinishedRun
from slm_jax.scaling.isoflop import Optimum
from slm_jax.scaling.points import CONFIDENCE
from slm_jax.scaling.prediction import Check, Estimate, Fits, Prediction
from slm_jax.scaling.study import size_setting
from slm_jax.sweep.plan import Trial
from slm_jax.utils.files import replace_text
from slm_jax.utils.formatting import duration, text_table

CSV = "results.csv"
JSON = "scaling.json"
PLOT = "scaling.png"
_LAW = {"E": "irreducible", "A": "a", "B": "b", "alpha": "alpha", "beta": "beta"}


def planned_table(trials: Sequence[Trial], seconds: Sequence[float]) -> str:
    """Return the runs of a study with their cost, seeds together."""
    seeds: dict[str, int] = {}
    for trial in trials:
        seeds[trial.setting.folder] = seeds.get(trial.setting.folder, 0) + 1
    header = ["budget", "parameters", "shape", "steps", "batch", "lr", "tokens", "FLOPs", "seeds", "time each"]
    rows = [header]
    times = dict(zip((trial.setting.folder for trial in trials), seconds, strict=True))
    for trial in {trial.setting.folder: trial for trial in trials}.values():
        setting, config = size_setting(trial), trial.config
        model = config.model
        rows.append(
            [
                f"{setting.budget:.3g}",
                format_compact(setting.parameters),
                f"{model.dim}x{model.depth}",
                f"{config.train.steps:,}",
                f"{config.train.batch_size}x{config.train.sequence_length}",
                f"{config.optimizer.lr:g}",
                format_compact(setting.tokens),
                f"{setting.flops:.2e}",
                str(seeds[setting.folder]),
                duration(times[setting.folder]),
            ]
        )
    return text_table(rows, set(range(len(header))) - {2})


def run_table(runs: Sequence[FinishedRun], metric: str) -> str:
    """Return the mean loss of each size at each budget, the best one of a budget marked."""
    groups: dict[tuple[float, int], list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault((size_setting(run.trial).budget, run.parameters), []).append(run)
    means = {key: sum(run.loss for run in group) / len(group) for key, group in groups.items()}
    best = {budget: min(mean for (other, _), mean in means.items() if other == budget) for budget, _ in means}
    rows = [["budget", "parameters", "tokens", "tokens per parameter", "seeds", metric, ""]]
    for (budget, parameters), group in sorted(groups.items()):
        mean = means[budget, parameters]
        rows.append(
            [
                f"{budget:.3g}",
                format_compact(parameters),
                format_compact(group[0].tokens),
                f"{group[0].tokens / parameters:.1f}",
                str(len(group)),
                f"{mean:.4f}",
                "best" if mean == best[budget] else "",
            ]
        )
    return text_table(rows, range(6))


def fit_lines(fits: Fits) -> Iterator[str]:
    """Yield the best sizes by budget, the power laws and the law of the loss, with 95 % intervals."""
    rows = [["budget", "best parameters", "95 %", "best tokens", "95 %", "tokens per parameter", "loss"]]
    for optimum in fits.isoflop.optima:
        size, tokens, loss = optimum_estimates(fits, optimum)
        ratio = f"{optimum.tokens / optimum.parameters:.1f}"
        rows.append(
            [
                f"{optimum.budget:.3g}",
                format_compact(size.value),
                _bounds(size),
                format_compact(tokens.value),
                _bounds(tokens),
                ratio,
                f"{loss.value:.4f}",
            ]
        )
    if fits.isoflop.optima:
        yield text_table(rows, range(7))
        yield ""
    for name, exponent in (("N*", fits.size_exponent()), ("D*", fits.tokens_exponent())):
        if exponent is not None:
            yield f"{name}(C) ~ C^{exponent.value:.2f}{_range(exponent, '.2f')}"
    if fits.law is not None:
        size = Estimate.of(fits.law.law.size_exponent, [law.size_exponent for law in fits.law.resampled])
        values = law_estimates(fits)
        e, a, b, alpha, beta = (values[name].value for name in _LAW)
        yield f"L(N, D) = {e:.3f} + {a:.4g} / N^{alpha:.3f} + {b:.4g} / D^{beta:.3f}"
        spreads = [
            f"{name}{_range(values[name], '.3f')}" for name in ("E", "alpha", "beta") if values[name].has_interval
        ]
        if spreads:
            yield f"95 %: {', '.join(spreads)}"
        yield f"by this law N*(C) ~ C^{size.value:.2f}{_range(size, '.2f')}"


def prediction_lines(prediction: Prediction, metric: str) -> Iterator[str]:
    """Yield the prediction for a larger budget in words."""
    yield (
        f"at {prediction.budget:.3g} FLOPs: N* = {format_compact(prediction.best_size.value)}"
        f"{_range(prediction.best_size)}, D* = {format_compact(prediction.best_tokens.value)}"
        f"{_range(prediction.best_tokens)}"
    )
    if prediction.loss is not None:
        setting = size_setting(prediction.trial)
        yield (
            f"a model of {format_compact(setting.parameters)} on {format_compact(setting.tokens)} tokens: {metric} "
            f"{prediction.loss.value:.4f}{_range(prediction.loss, '.4f')} for one run"
        )


def check_line(check: Check, metric: str) -> str:
    """Return the verdict of a held-out run in words."""
    where = "inside" if check.passed else "OUTSIDE"
    return (
        f"held-out run, {size_setting(check.run.trial).label}: {metric} {check.run.loss:.4f}, {where} the interval "
        f"{check.predicted.low:.4f} to {check.predicted.high:.4f}"
    )


def optimum_estimates(fits: Fits, optimum: Optimum) -> tuple[Estimate, Estimate, Estimate]:
    """Return N*, D* and the loss of a budget with their intervals."""
    resampled = fits.isoflop.resampled[optimum.budget]
    return (
        Estimate.of(optimum.parameters, [each.parameters for each in resampled]),
        Estimate.of(optimum.tokens, [each.tokens for each in resampled]),
        Estimate.of(optimum.loss, [each.loss for each in resampled]),
    )


def law_estimates(fits: Fits) -> dict[str, Estimate]:
    """Return the values of the law with their intervals; empty without a law."""
    law = fits.law
    if law is None:
        return {}
    return {
        name: Estimate.of(getattr(law.law, field), [getattr(each, field) for each in law.resampled])
        for name, field in _LAW.items()
    }


def _bounds(estimate: Estimate) -> str:
    if not estimate.has_interval:
        return ""
    return f"{format_compact(estimate.low)} - {format_compact(estimate.high)}"


def _range(estimate: Estimate, form: str = "") -> str:
    """Return the interval in parentheses, "" without one."""
    if not estimate.has_interval:
        return ""
    low, high = (f"{each:{form}}" if form else format_compact(each) for each in (estimate.low, estimate.high))
    return f" ({low} to {high})"


def write_csv(path: Path, trials: Sequence[Trial], runs: Sequence[FinishedRun], metric: str) -> None:
    """Write a row for each run: budget, size, tokens, FLOPs, seed and loss; those of an unfinished one are empty."""
    finished = {run.trial.run.name: run for run in runs}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["budget", "parameters", "tokens", "flops", "epochs", "train.seed", metric, "run"])
    for trial in trials:
        run = finished.get(trial.run.name)
        measured = [run.parameters, f"{run.tokens:.0f}", f"{run.flops:.6g}", f"{run.epochs:.3f}"] if run else [""] * 4
        loss = run.loss if run else ""
        budget = f"{size_setting(trial).budget:g}"
        writer.writerow([budget, *measured, trial.config.train.seed, loss, trial.run.name])
    replace_text(path, text.getvalue())


def write_json(
    path: Path, fits: Fits, prediction: Prediction | None, check: Check | None, metric: str, notes: Sequence[str]
) -> None:
    """Write all results; values are `{"value": …, "low": …, "high": …}` with the bounds of the 95 % interval."""
    budgets = []
    for optimum in fits.isoflop.optima:
        size, tokens, loss = optimum_estimates(fits, optimum)
        row = {"best_parameters": size, "best_tokens": tokens, "loss": loss}
        budgets.append(
            {"budget": optimum.budget, "flops": optimum.flops} | {name: _json(each) for name, each in row.items()}
        )
    exponents = {"parameters": fits.size_exponent(), "tokens": fits.tokens_exponent()}
    content: dict[str, Any] = {
        "metric": metric,
        "runs": len(fits.points),
        "confidence": CONFIDENCE,
        "budgets": budgets,
        "exponents": {name: _json(each) for name, each in exponents.items() if each is not None},
        "law": {name: _json(each) for name, each in law_estimates(fits).items()},
        "notes": list(notes),
    }
    if prediction is not None:
        content["prediction"] = {
            "flops": prediction.budget,
            "best_parameters": _json(prediction.best_size),
            "best_tokens": _json(prediction.best_tokens),
            "parameters": size_setting(prediction.trial).parameters,
            "tokens": size_setting(prediction.trial).tokens,
        } | ({"loss": _json(prediction.loss)} if prediction.loss else {})
    if check is not None:
        content["check"] = {
            "parameters": check.run.parameters,
            "tokens": check.run.tokens,
            "loss": check.run.loss,
            "predicted": _json(check.predicted),
            "passed": check.passed,
        }
    replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _json(estimate: Estimate) -> dict[str, float | None]:
    """Return an estimate with ten significant digits; the bounds are None without an interval."""
    values = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: float(f"{value:.10g}") if math.isfinite(value) else None for name, value in values.items()}
