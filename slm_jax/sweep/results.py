"""Scores by setting: means over the seeds with confidence intervals, as a table, a CSV file and a plot."""

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_jax.config.paths import RUNS
from slm_jax.report.training_plot import save_figure
from slm_jax.sweep.axes import Axis, Setting
from slm_jax.sweep.plan import Trial
from slm_jax.sweep.run import Scores
from slm_jax.utils.files import replace_text
from slm_jax.utils.formatting import plural, text_table

RESULTS = "results.csv"
PLOT = "sweep.png"
CONFIDENCE = 0.95
_MAX_TICKS = 6


@dataclass(frozen=True)
class SettingScore:
    """The scores of a setting.

    Attributes:
        setting: The values of the varied options.
        by_seed: The score of each finished seed.
        failed: Number of seeds that ended with an error.
    """

    setting: Setting
    by_seed: Mapping[int, float]
    failed: int = 0

    @property
    def mean(self) -> float:
        """Mean over the seeds; infinite without scores, or if a seed failed: such a setting is not usable."""
        return statistics.fmean(self.by_seed.values()) if self.by_seed and not self.failed else math.inf

    @property
    def half_width(self) -> float:
        """Half the width of the confidence interval of the mean (Student's t); NaN without two finite scores."""
        if len(self.by_seed) < 2 or not all(map(math.isfinite, self.by_seed.values())):
            return math.nan
        from scipy.stats import t

        error = statistics.stdev(self.by_seed.values()) / math.sqrt(len(self.by_seed))
        return float(t.ppf((1 + CONFIDENCE) / 2, len(self.by_seed) - 1)) * error


def by_setting(trials: Sequence[Trial], scores: Scores) -> list[SettingScore]:
    """Return the scores of each setting that has any, the lowest mean first."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.setting.folder, []).append(trial)
    rows = []
    for group in groups.values():
        names = [trial.run.name for trial in group]
        by_seed = {
            trial.config.train.seed: scores.values[trial.run.name] for trial in group if trial.run.name in scores.values
        }
        failed = sum(name in scores.failures for name in names)
        if by_seed or failed:
            rows.append(SettingScore(group[0].setting, by_seed, failed))
    return sorted(rows, key=lambda row: row.mean)


def differs(first: SettingScore, second: SettingScore) -> bool | None:
    """Return whether two means differ at the confidence level, by the paired t-test over the seeds that both have.

    Runs of one seed have the same order of the data, and the same initial weights where their shapes are equal: their
    difference varies less than their scores.

    Returns:
        None with less than two common seeds, which prove nothing.
    """
    seeds = first.by_seed.keys() & second.by_seed.keys()
    if len(seeds) < 2:
        return None
    differences = [first.by_seed[seed] - second.by_seed[seed] for seed in seeds]
    if not all(map(math.isfinite, differences)):
        return True
    if statistics.stdev(differences) == 0:
        return differences[0] != 0
    from scipy.stats import ttest_1samp

    return bool(ttest_1samp(differences, 0.0).pvalue < 1 - CONFIDENCE)


def table(rows: Sequence[SettingScore], metric: str) -> str:
    """Return the settings with their scores as text."""
    names = list(rows[0].setting.values)
    header = [*(name.rpartition(".")[2] for name in names), metric, "± 95 %", "seeds", "failed"]
    cells = [[*map(str, row.setting.values.values()), *_cells(row)] for row in rows]
    return text_table([header, *cells], range(len(names), len(header)))


def _cells(row: SettingScore) -> list[str]:
    mean = f"{statistics.fmean(row.by_seed.values()):.4f}" if row.by_seed else ""
    half_width = "" if math.isnan(row.half_width) else f"{row.half_width:.4f}"
    return [mean, half_width, str(len(row.by_seed)), str(row.failed or "")]


def left_out(folder: Path, trials: Sequence[Trial]) -> Iterator[str]:
    """Yield a line about the trials in a folder that the results do not have, since their values were not given again.

    Args:
        folder: The folder of the sweep.
        trials: The trials of the results.
    """
    names = {trial.run.name for trial in trials}
    others = sum(path.is_dir() and path.name not in names for path in (folder / RUNS).glob("[!.]*"))
    if others:
        runs = plural(others, "other trial")
        yield f"left out: {runs} in {folder / RUNS}; give their values and seeds as well to compare all"


def summary(rows: Sequence[SettingScore]) -> Iterator[str]:
    """Yield sentences about the best setting, and those that cannot be distinguished from it."""
    best = rows[0]
    if math.isinf(best.mean):
        yield "No setting has a score."
        return
    yield f"best: {best.setting.label}"
    others = [row for row in rows[1:] if math.isfinite(row.mean)]
    verdicts = [differs(best, row) for row in others]
    if None in verdicts:
        yield "Which differences are more than chance cannot be said from one seed: give --seeds 3 or more."
        return
    close = [row.setting.label for row, verdict in zip(others, verdicts, strict=True) if not verdict]
    if close:
        yield "not distinguishable from it with these seeds (paired t-test, 5 %): " + "; ".join(close)
    elif others:
        yield "all others differ from it (paired t-test, 5 %, not corrected for the number of comparisons)"


def write_csv(path: Path, trials: Sequence[Trial], scores: Scores, metric: str) -> None:
    """Write a row for each trial: the varied options, the seed, the score, and the error of a failed one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(trials[0].setting.values)
    writer.writerow([*names, "train.seed", metric, "error", "run"])
    for trial in trials:
        name = trial.run.name
        score = scores.values.get(name, "")
        values = [trial.setting.values[each] for each in names]
        writer.writerow([*values, trial.config.train.seed, score, scores.failures.get(name, ""), name])
    replace_text(path, text.getvalue())


def plot(path: Path, axes: Sequence[Axis], rows: Sequence[SettingScore], metric: str) -> None:
    """Draw the score over the values of each axis: a point for each setting, and a line through the best of each value.

    Args:
        path: The PNG file to write.
        axes: The varied options.
        rows: The scores.
        metric: The name of the score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4 * len(axes), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    usable = [row for row in rows if math.isfinite(row.mean)]
    for panel, axis in zip(panels, axes, strict=True):
        values = [row.setting.values[axis.names[0]] for row in usable]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        labels = sorted(set(values)) if numeric else list(dict.fromkeys(values))
        places = values if numeric else [labels.index(value) for value in values]
        errors = [0.0 if math.isnan(row.half_width) else row.half_width for row in usable]
        panel.errorbar(places, [row.mean for row in usable], errors, fmt="o", alpha=0.6, capsize=3)
        lowest: dict[float, float] = {}
        for place, row in zip(places, usable, strict=True):
            lowest[place] = min(row.mean, lowest.get(place, math.inf))
        panel.plot(sorted(lowest), [lowest[place] for place in sorted(lowest)], color="tab:gray", linewidth=1)
        if numeric and values and min(values) > 0 and max(values) >= 5 * min(values):
            panel.set_xscale("log")
        if not numeric:
            panel.set_xticks(range(len(labels)), [str(label) for label in labels])
        elif len(labels) <= _MAX_TICKS:
            panel.set_xticks(labels, [f"{label:g}" for label in labels])
            panel.set_xticks([], minor=True)
        panel.set_xlabel(" + ".join(axis.names))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(metric)
    save_figure(figure, path)
