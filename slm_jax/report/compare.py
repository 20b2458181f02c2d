"""Several runs side by side: a table by bits per byte, curves over each other, and where their configs differ."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slm_jax.report import escape, markup
from slm_jax.report.axes import compact, figure, percent, span
from slm_jax.report.charts import Chart, Line, Tracks, render
from slm_jax.report.columns import AXES
from slm_jax.report.curves import SHARE, Stretches, Values, with_controls
from slm_jax.report.escape import Safe
from slm_jax.report.markup import Section
from slm_jax.report.run_data import Subject
from slm_jax.report.sections import config_differences
from slm_jax.run.metrics import Row

POINTS = 300  # of a line


def ranked(subjects: list[Subject]) -> list[Subject]:
    """The best first: by validation bits per byte, those without behind."""
    return sorted(subjects, key=lambda s: s.scores.get("val_bits_per_byte", np.inf))


def names_of(subjects: list[Subject]) -> list[str]:
    """Their directories' names, with as much of the path before as tells equal ones apart."""
    paths = [subject.path.resolve() for subject in subjects]
    names = [path.name for path in paths]
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        counts = Counter(names)
        if max(counts.values()) == 1:
            break
        names = ["/".join(p.parts[-depth:]) if counts[name] > 1 else name for p, name in zip(paths, names, strict=True)]
    return names


def comparison_html(subjects: list[Subject]) -> str:
    """The page of runs, the best first."""
    subjects = ranked(subjects)
    names, tracks = names_of(subjects), Tracks()
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    title = f"{len(subjects)} runs compared"
    told = markup.paragraph(f"Sorted by validation bits per byte, the lowest first. This page is of {made}.", "muted")
    notes = "".join(f"<div>{escape.text(note)}</div>" for note in cautions(subjects, names))
    note = f'<div class="note" role="note">{notes}</div>' if notes else ""
    parts = [
        Section("Runs", markup.table(HEAD, table_rows(subjects, names), range(1, len(HEAD) - 1), "Runs")),
        Section("Curves", _curves(subjects, names, tracks)),
        Section("Evaluation", _evaluation(subjects, names)),
        Section("Config", config_differences([(n, s.last.config) for n, s in zip(names, subjects, strict=True)])),
    ]
    return markup.page(title, Safe(f"<h1>{title}</h1>{told}{note}"), parts, tracks.html())


HEAD = ["run", "bits per byte", "loss", "accuracy", "parameters", "ids", "steps", "tokens", "FLOPs", "time", "state"]


def table_rows(subjects: list[Subject], names: list[str]) -> Iterator[list[str]]:
    """A row of `HEAD` for each run."""
    for subject, name in zip(subjects, names, strict=True):
        scores, columns = subject.scores, subject.columns
        yield [
            name,
            f"{scores['val_bits_per_byte']:.4f}" if scores else "",
            f"{scores['val_loss']:.4f}" if scores else "",
            percent(scores["val_accuracy"]) if scores else "",
            compact(subject.last.parameters) if subject.last.vocab_size else "",
            f"{subject.last.vocab_size:,}",
            f"{int(columns.end['step']):,}",
            compact(columns.end["tokens"]),
            f"{subject.flops:.2e}" if len(columns) else "",
            span(columns.end["seconds"]),
            subject.state.partition(":")[0],
        ]


def cautions(subjects: list[Subject], names: list[str]) -> Iterator[str]:
    """Why figures may not be comparable."""
    texts: dict[str, list[str]] = {}
    for subject, name in zip(subjects, names, strict=True):
        texts.setdefault(subject.held_out, []).append(name)
    if len(texts) > 1:
        groups = "; ".join(", ".join(each) for each in texts.values())
        yield f"Validated on different text: figures can be compared only within each of these groups: {groups}."
    elif len({subject.last.tokenizer and subject.last.tokenizer.fingerprint for subject in subjects}) > 1:
        yield "Their tokenizers differ: compare bits per byte, not loss, perplexity or accuracy."
    ways: dict[str, dict[str, list[str]]] = {}
    for subject, name in zip(subjects, names, strict=True):
        for task, row in {row["task"]: row for row in _measured(subject).values()}.items():
            ways.setdefault(task, {}).setdefault(_how(row), []).append(name)
    for task, of_task in ways.items():
        if len(of_task) > 1:
            groups = "; ".join(f"{', '.join(each)}: {how}" for how, each in of_task.items())
            yield f"{task} was not measured alike, so its figures cannot be compared between these: {groups}."
    devices = {call.get("device") for subject in subjects for call in subject.last.calls[-1:]}
    if len(devices) > 1:
        yield "They were trained on different devices: times and speeds are not of the same hardware."


def _measured(subject: Subject) -> dict[tuple[str, str], Row]:
    """Whole tasks by task and metric: the row of the newest stage that measured it."""
    return {(row["task"], str(row.get("metric", ""))): row for row in subject.evaluation if row["group"] in ("", "all")}


def _how(row: Row) -> str:
    """What a figure depends on beside the model, in words."""
    about = row["about"]
    data = str(about.get("data", "set not noted")).partition(" (kept in ")[0]  # the same set, fetched or kept
    windows = f"context {about.get('context', 'not noted')}, stride {about.get('stride', 'not noted')}"
    return f"{data}, {row.get('count', 'unknown')} items, {windows}"


def _curves(subjects: list[Subject], names: list[str], tracks: Tracks) -> Safe:
    drawn = [
        (i, Stretches(subject, POINTS), name)
        for i, (subject, name) in enumerate(zip(subjects, names, strict=True))
        if len(subject.columns)
    ]

    def lines(values: str | Values, smooth: bool = False) -> list[Line]:  # without bands: many of them show nothing
        return [each.line(values, name, smooth, i, band=False) for i, each, name in drawn]

    validated = [line for i, each, name in drawn for line in each.validation("val_bits_per_byte", name, i)]
    bits = lines(lambda columns: columns.bits_per_byte, True)
    charts = [
        Chart("Validation", "bits per byte of held-out text", validated, axes=AXES, wide=True),
        Chart("Training", "bits per byte of the text predicted", bits, axes=AXES, wide=True),
        Chart("Learning rate", "per step", lines("lr"), axes=AXES, zero=True),
        Chart("Gradient norm", "before clipping", lines("grad_norm", True), axes=AXES),
        Chart("Speed", "tokens per second", lines("tokens_per_second"), axes=AXES, log=False, zero=True),
        Chart("Model FLOPs utilisation", "of the peak", lines("mfu"), axes=AXES, **SHARE),
    ]
    if not drawn:
        return Safe("")
    note = "Smoothed: the mean of a fiftieth of a run's steps around each."
    return with_controls((render(chart, tracks) for chart in charts), AXES, note)


def _evaluation(subjects: list[Subject], names: list[str]) -> Safe:
    """Whole tasks by run: value and interval."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for i, subject in enumerate(subjects):
        for key, row in _measured(subject).items():
            share = "accuracy" in str(row.get("metric", "")) and 0 <= row["value"] <= 1
            form = percent if share else figure
            low, high = row.get("low"), row.get("high")
            known = isinstance(low, int | float) and isinstance(high, int | float)
            interval = f" ({form(low)} – {form(high)})" if known else ""  # type: ignore[arg-type]
            found.setdefault(key, {})[i] = form(row["value"]) + interval
    if not found:
        return Safe("")
    rows = [
        [task, metric.replace("_", " "), *(cells.get(i, "") for i in range(len(subjects)))]
        for (task, metric), cells in found.items()
    ]
    return markup.table(["task", "metric", *names], rows, range(2, len(names) + 2), "Evaluation")


def default_place(subjects: list[Subject]) -> Path:
    """Beside the first run."""
    return subjects[0].path.resolve().parent / "comparison.html"
