"""Comparison of several runs: a table sorted by bits per byte, overlaid curves, and the options that differ."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slm_jax.report import markup
from slm_jax.report.axes import format_compact, format_duration, format_percent
from slm_jax.report.charts import Chart, Line, SharedX, render
from slm_jax.report.columns import AXES, smoothing_width
from slm_jax.report.curves import PERCENT, RunLines, Values, with_controls
from slm_jax.report.escaping import SafeHtml
from slm_jax.report.markup import Section
from slm_jax.report.run_data import ReportData
from slm_jax.report.scores import is_complete_task, value_with_interval
from slm_jax.report.sections import config_differences
from slm_jax.run.metrics import Row

POINTS = 300  # of the longest line
_MIN_POINTS = 20  # of a line
HEADER = ["run", "bits per byte", "loss", "accuracy", "parameters", "vocab", "steps", "tokens", "FLOPs", "time"]
HEADER += ["state"]


def ranked(runs: list[ReportData]) -> list[ReportData]:
    """Sort runs by validation bits per byte, the lowest first; runs without validation come last."""
    return sorted(runs, key=lambda run: run.scores.get("val_bits_per_byte", np.inf))


def run_names(runs: list[ReportData]) -> list[str]:
    """Return the names of the directories, with as many parent directories as are needed to distinguish equal ones."""
    paths = [run.path.resolve() for run in runs]
    names = [path.name for path in paths]
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        counts = Counter(names)
        if max(counts.values()) == 1:
            break
        names = [
            "/".join(path.parts[-depth:]) if counts[name] > 1 else name for path, name in zip(paths, names, strict=True)
        ]
    return names


def comparison_html(runs: list[ReportData]) -> str:
    """Return the page that compares runs."""
    runs = ranked(runs)
    names = run_names(runs)
    shared_x = SharedX()
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    title = f"Comparison of {len(runs)} runs"
    head = markup.concatenate(
        [
            SafeHtml(f"<h1>{title}</h1>"),
            markup.paragraph(f"Sorted by validation bits per byte, lowest first. Page written {now}.", "muted"),
            markup.note(list(comparison_notes(runs, names))),
        ]
    )
    configs = [(name, run.last.config) for name, run in zip(names, runs, strict=True)]
    parts = [
        Section("Runs", markup.table(HEADER, table_rows(runs, names), range(1, len(HEADER) - 1), "Runs")),
        Section("Curves", _curves(runs, names, shared_x)),
        Section("Evaluation", _evaluation_table(runs, names)),
        Section("Config", config_differences(configs)),
    ]
    return markup.page(title, head, parts, shared_x.html())


def table_rows(runs: list[ReportData], names: list[str]) -> Iterator[list[str]]:
    """Yield the cells of a run, as in `HEADER`."""
    for run, name in zip(runs, names, strict=True):
        scores = run.scores
        columns = run.columns
        is_dpo = run.last.config.train.objective == "dpo"
        yield [
            name,
            f"{scores['val_bits_per_byte']:.4f}" if scores else "",
            f"{scores['val_loss']:.4f}{' per pair' * is_dpo}" if scores else "",
            f"{format_percent(scores['val_accuracy'])}{' of pairs' * is_dpo}" if scores else "",
            format_compact(run.last.num_parameters) if run.last.vocab_size else "",
            f"{run.last.vocab_size:,}",
            f"{int(columns.end['step']):,}",
            format_compact(columns.end["tokens"]),
            f"{run.flops:.2e}" if len(columns) else "",
            format_duration(columns.end["seconds"]),
            run.state.partition(":")[0],
        ]


def comparison_notes(runs: list[ReportData], names: list[str]) -> Iterator[str]:
    """Yield the reasons why numbers of the runs may not be comparable."""
    texts: dict[str, list[str]] = {}
    for run, name in zip(runs, names, strict=True):
        texts.setdefault(run.held_out_digest, []).append(name)
    fingerprints = {run.last.tokenizer and run.last.tokenizer.fingerprint for run in runs}
    if len(texts) > 1:
        groups = "; ".join(", ".join(group) for group in texts.values())
        yield f"Validated on different text: scores are comparable only within each of these groups: {groups}."
    elif len(fingerprints) > 1:
        yield "The tokenizers differ: compare bits per byte, not loss, perplexity or accuracy."
    yield from _validation_notes(runs, names)
    yield from _evaluation_notes(runs, names)
    devices = {call.get("device") for run in runs for call in run.last.calls[-1:]}
    if len(devices) > 1:
        yield "Trained on different devices: times and speeds are not comparable."


def _validation_notes(runs: list[ReportData], names: list[str]) -> Iterator[str]:
    """Yield the options that differ although a validation score depends on them: objective, windows, predictions."""
    differing = []
    for option in ("train.objective", "data.mode", "train.sequence_length", "data.loss_on", "eval.max_tokens"):
        groups: dict[str, list[str]] = {}
        for run, name in zip(runs, names, strict=True):
            groups.setdefault(str(run.last.config.flat()[option]), []).append(name)
        if len(groups) > 1:
            values = "; ".join(f"{value}: {', '.join(group)}" for value, group in groups.items())
            differing.append(f"{option} ({values})")
    if differing:
        yield f"Validated in different ways, so the scores and their order are not comparable: {', '.join(differing)}."


def _evaluation_notes(runs: list[ReportData], names: list[str]) -> Iterator[str]:
    methods: dict[str, dict[str, list[str]]] = {}  # names of the runs by task and method
    for run, name in zip(runs, names, strict=True):
        rows = {row["task"]: row for row in _complete_tasks(run).values()}  # one per task
        for task, row in rows.items():
            methods.setdefault(task, {}).setdefault(_method(row), []).append(name)
    for task, groups in methods.items():
        if len(groups) > 1:
            described = "; ".join(f"{', '.join(group)}: {method}" for method, group in groups.items())
            yield f"{task} was measured in different ways, so its scores are not comparable: {described}."


def _complete_tasks(run: ReportData) -> dict[tuple[str, str], Row]:
    """Return the result rows of complete tasks by task and metric; of several stages the newest."""
    return {(row["task"], str(row.get("metric", ""))): row for row in run.evaluation if is_complete_task(row)}


def _method(row: Row) -> str:
    """Describe what a score depends on other than the model."""
    about = row["about"]
    # The same data set, whether it was downloaded or read from the cache.
    dataset = str(about.get("data", "unknown data")).partition(" (kept in ")[0]
    context = about.get("context", "unknown")
    stride = about.get("stride", "unknown")
    return f"{dataset}, {row.get('count', 'unknown')} items, context {context}, stride {stride}"


def _curves(runs: list[ReportData], names: list[str], shared_x: SharedX) -> SafeHtml:
    lengths = [len(run.columns) for run in runs if len(run.columns)]
    if not lengths:
        return SafeHtml("")
    # As many steps per point and per average in all runs: the mean of more steps varies less.
    smoothing = smoothing_width(min(lengths))
    drawn = [
        (color, RunLines(run, max(_MIN_POINTS, POINTS * len(run.columns) // max(lengths)), smoothing), name)
        for color, (run, name) in enumerate(zip(runs, names, strict=True))
        if len(run.columns)
    ]

    def lines(
        values: str | Values, smooth: bool = False
    ) -> list[Line]:  # no bands: overlaid, they would hide the lines
        return [run_lines.metric(values, name, smooth, color, band=False) for color, run_lines, name in drawn]

    validations: list[Line] = []
    for color, run_lines, name in drawn:
        validations.extend(run_lines.validation("val_bits_per_byte", name, color))
    bits = lines(lambda columns: columns.bits_per_byte, True)
    speed = lines("tokens_per_second")
    charts = [
        Chart("Validation", "bits per byte of held-out text", validations, axes=AXES, wide=True),
        Chart("Training", "bits per byte of predicted text", bits, axes=AXES, wide=True),
        Chart("Learning rate", "schedule", lines("lr"), axes=AXES, include_zero=True),
        Chart("Gradient norm", "before clipping", lines("grad_norm", True), axes=AXES),
        Chart("Speed", "tokens per second", speed, axes=AXES, log=False, include_zero=True),
        Chart("Model FLOPs utilization", "share of the peak", lines("mfu"), axes=AXES, **PERCENT),
    ]
    note = f"Smoothed lines are moving averages over {smoothing} steps, a fiftieth of the shortest run."
    return with_controls((render(chart, shared_x) for chart in charts), AXES, note)


def _evaluation_table(runs: list[ReportData], names: list[str]) -> SafeHtml:
    """Return a table of complete tasks with a column per run."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for i, run in enumerate(runs):
        for key, row in _complete_tasks(run).items():
            cells.setdefault(key, {})[i] = value_with_interval(row)
    if not cells:
        return SafeHtml("")
    rows = [
        [task, metric.replace("_", " "), *(by_run.get(i, "") for i in range(len(runs)))]
        for (task, metric), by_run in cells.items()
    ]
    return markup.table(["task", "metric", *names], rows, range(2, len(names) + 2), "Evaluation")


def default_path(runs: list[ReportData]) -> Path:
    """Return the path of the comparison if none is given: next to the first run."""
    return runs[0].path.resolve().parent / "comparison.html"
