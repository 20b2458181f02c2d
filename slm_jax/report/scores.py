"""The sections with measured scores: validation, stages of a curriculum, evaluation tasks, and benchmark rows."""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from slm_jax.report import markup
from slm_jax.report.axes import format_compact, format_duration, format_number, format_percent
from slm_jax.report.escaping import SafeHtml, escape_text
from slm_jax.report.run_data import ReportData, RunData, is_number
from slm_jax.report.tokenizer_section import token_counts
from slm_jax.run.metrics import Row, source_scores
from slm_jax.run.results import is_share

_MAX_VALIDATIONS = 30  # rows shown at once; the others are in a collapsible part
_MAX_NOWRAP = 40  # characters of a benchmark cell that stays on one line


def validation_section(data: ReportData) -> SafeHtml:
    """Return a table of the validation scores, the newest first, followed by baselines without a model."""
    columns = data.columns
    if not columns.validations:
        return SafeHtml("")
    stages = [stage.stage for stage in data.stages for _ in stage.columns.validations]
    preferences = {stage.stage for stage in data.stages if stage.config.train.objective == "dpo"}
    rows: list[list[str]] = []
    for row, index, stage in zip(columns.validations, columns.validation_indices().tolist(), stages, strict=True):
        tokens = format_compact(float(columns.x["tokens"][index]))
        seconds = format_duration(float(columns["seconds"][index]))
        is_dpo = stage in preferences
        rows.append([f"{int(row['step']):,}", stage, *_score_cells(row, is_dpo), tokens, seconds])
    rows.reverse()
    rows += [[name, "", *cells, "", ""] for name, cells in baselines(data.last)]
    header = ["step", "stage", "bits per byte", "loss", "perplexity", "accuracy", "tokens", "training time"]
    numbers = range(2, 8)
    if not data.is_curriculum:
        header, rows = _without_column(1, header, rows)
        numbers = range(1, 7)
    parts = [markup.table(header, rows[:_MAX_VALIDATIONS], numbers, "Validation scores")]
    rest = rows[_MAX_VALIDATIONS:]
    if rest:
        more = markup.table(header, rest, numbers, "Further validation scores")
        parts.append(markup.collapsible(f"{len(rest)} more", more))
    newest = columns.validations[-1]
    losses = source_scores(newest, "val_loss")
    if losses:
        bits = source_scores(newest, "val_bits_per_byte")
        cells = [[name, f"{bits[name]:.4f}" if name in bits else "", f"{losses[name]:.4f}"] for name in losses]
        note = f"Step {int(newest['step']):,} by source. Above, a source weighs as much as its held-out text."
        table = markup.table(["source", "bits per byte", "loss"], cells, range(1, 3), "Validation by source")
        parts += [markup.paragraph(note, "muted"), table]
    return markup.concatenate(parts)


def _without_column(index: int, header: list[Any], rows: list[list[Any]]) -> tuple[list[Any], list[list[Any]]]:
    return header[:index] + header[index + 1 :], [row[:index] + row[index + 1 :] for row in rows]


def _score_cells(row: Row, is_dpo: bool) -> list[str]:
    """Return the scores of a validation; with DPO loss and accuracy are of pairs, the others of chosen responses."""
    return [
        f"{row['val_bits_per_byte']:.4f}",
        f"{row['val_loss']:.4f}{' per pair' * is_dpo}",
        format_number(row["val_perplexity"]),
        f"{format_percent(row['val_accuracy'])}{' of pairs' * is_dpo}",
    ]


def baselines(run_data: RunData) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the score cells of predictions without a model, on the text used for validation.

    Nothing is yielded if the text is not available, or if it has prompts, whose tokens are not predicted.
    """
    stream = run_data.validation_stream
    vocab_size = run_data.vocab_size
    held_out = token_counts(stream, vocab_size)
    training = token_counts(run_data.token_stream("train"), vocab_size)
    if not stream or held_out is None or training is None or stream.has_prompts:
        return
    probabilities = (training + 1) / (training.sum() + vocab_size)  # add-one smoothing: no token is impossible
    shares = held_out / held_out.sum()
    unigram_loss = float(-(shares * np.log(probabilities)).sum())
    unigram_accuracy = float(shares[probabilities.argmax()])
    for name, loss, accuracy in (
        ("baseline: token frequencies", unigram_loss, unigram_accuracy),
        ("baseline: uniform", math.log(vocab_size), 1 / vocab_size),
    ):
        bits = loss / math.log(2) * len(stream) / stream.num_bytes
        yield name, [f"{bits:.4f}", f"{loss:.4f}", format_number(math.exp(loss)), format_percent(accuracy)]


def stages_section(data: ReportData) -> SafeHtml:
    """Return a table of each stage's model on each stage's held-out text: what was learned and what was forgotten."""
    scores = {(str(row["after"]), str(row["text"])): row["bits_per_byte"] for row in data.stage_scores}
    if not scores:
        return SafeHtml("")
    models = sorted({model for model, _ in scores})
    texts = sorted({text for _, text in scores})
    best = {text: min(value for (_, scored), value in scores.items() if scored == text) for text in texts}
    rows = []
    for model in models:
        row: list[object] = [f"after {model}"]
        for text in texts:
            value = scores.get((model, text))
            cell = "" if value is None else f"{value:.4f}"
            row.append(SafeHtml(f"<b>{cell}</b>") if value == best[text] else cell)
        rows.append(row)
    description = "Bits per byte on the held-out text of each stage. The best value of each column is bold."
    table = markup.table(["model", *texts], rows, range(1, len(texts) + 1), "Stages")
    return markup.concatenate([markup.paragraph(description, "muted"), table])


def evaluation_section(data: ReportData) -> SafeHtml:
    """Return the tables of evaluation.json: complete tasks first, then the parts of tasks that have parts."""
    if not data.evaluation:
        return SafeHtml("")
    complete = [row for row in data.evaluation if is_complete_task(row)]
    parts: dict[str, list[Row]] = {}
    for row in data.evaluation:
        if not is_complete_task(row) and row["group"] != "clean":  # those are beside the complete tasks
            parts.setdefault(task_title(row, data), []).append(row)
    blocks = [_evaluation_table(complete, data, by_part=False)] if complete else []
    for task, rows in parts.items():
        blocks.append(markup.collapsible(f"{task}: {len(rows)} parts", _evaluation_table(rows, data, by_part=True)))
    notes = {task_title(row, data): str(row["about"]["note"]) for row in data.evaluation if row["about"].get("note")}
    if notes:
        blocks.append(markup.collapsible("Methods", markup.properties(notes.items())))
    return markup.concatenate(blocks)


def is_complete_task(row: Row) -> bool:
    """Return whether a result row is for a complete data set, not for a part of it."""
    return row["group"] in ("", "all")


def task_title(row: Row, data: ReportData) -> str:
    """Return the task of a result row, for a curriculum with the name of the stage."""
    return f"{row['stage']}: {row['task']}" if data.is_curriculum and row.get("stage") else str(row["task"])


def _evaluation_table(rows: list[Row], data: ReportData, by_part: bool) -> SafeHtml:
    # Column name and cells; the columns that are shown depend on the rows.
    columns: dict[str, list[object]] = {}
    columns["part" if by_part else "task"] = [row["group"] if by_part else row["task"] for row in rows]
    if data.is_curriculum:
        columns["stage"] = [row.get("stage", "") for row in rows]
    columns["metric"] = [metric_text(row) for row in rows]
    columns["value"] = [_value_text(row, row["value"]) for row in rows]
    columns["95 % interval"] = [_interval_text(row) for row in rows]
    clean = {} if by_part else _clean_values(data)
    if clean:
        columns["clean items"] = [clean.get(_metric_key(row), "") for row in rows]
    if any(map(_is_fraction, rows)):
        columns["0 – 100 %"] = [_whisker(row) for row in rows]
    columns["items"] = [format_number(row["count"]) if is_number(row.get("count")) else "" for row in rows]
    columns["step"] = [f"{row['step']:,}" if isinstance(row.get("step"), int) else "" for row in rows]
    if any(row.get("reference") for row in rows):
        columns["references"] = [row.get("reference", "") for row in rows]
    header = list(columns)
    numeric = ("value", "95 % interval", "clean items", "items", "step")
    numbers = {i for i, name in enumerate(header) if name in numeric}
    cells = list(zip(*columns.values(), strict=True))
    return markup.table(header, cells, numbers, "Evaluation by part" if by_part else "Evaluation")


def _metric_key(row: Row) -> tuple[str, ...]:
    return str(row.get("stage", "")), str(row["task"]), str(row.get("metric", ""))


def _clean_values(data: ReportData) -> dict[tuple[str, ...], str]:
    """Return the values over the items that the training text does not contain, by stage, task and metric."""
    return {_metric_key(row): _value_text(row, row["value"]) for row in data.evaluation if row["group"] == "clean"}


def metric_text(row: Row) -> str:
    """Return the name of the metric of a result row in words."""
    return str(row.get("metric", "")).replace("_", " ")


def _is_fraction(row: Row) -> bool:
    return is_share(str(row.get("metric", ""))) and 0 <= row["value"] <= 1


def _value_text(row: Row, value: Any) -> str:
    return format_percent(value) if _is_fraction(row) else format_number(value)


def _interval_text(row: Row) -> str:
    low, high = row.get("low"), row.get("high")
    return f"{_value_text(row, low)} – {_value_text(row, high)}" if is_number(low) and is_number(high) else ""


def value_with_interval(row: Row) -> str:
    """Return the value of a result row with its confidence interval in parentheses."""
    value = _value_text(row, row["value"])
    interval = _interval_text(row)
    return f"{value} ({interval})" if interval else value


def _whisker(row: Row) -> SafeHtml:
    """Return a drawing of a fraction and its interval on a line from 0 to 100 %, with a tick at chance."""
    if not _is_fraction(row):
        return SafeHtml("")

    def x(fraction: float) -> str:
        return f"{2 + 136 * min(max(fraction, 0.0), 1.0):.1f}"

    low, high = row.get("low"), row.get("high")
    interval = ""
    if is_number(low) and is_number(high):
        interval = f'<path d="M{x(low)} 9H{x(high)}"/>'  # type: ignore[arg-type]
    chance = re.search(r"chance ([\d.]+) ?%", str(row.get("reference", "")))
    tick = f'<path class="ref" d="M{x(float(chance[1]) / 100)} 1V17"/>' if chance else ""
    return SafeHtml(
        '<svg class="whisker" viewBox="0 0 140 18" aria-hidden="true"><path class="axis" d="M2 9H138M2 5V13M138 5V13"/>'
        f'{tick}{interval}<circle cx="{x(row["value"])}" cy="9" r="4"/></svg>'
    )


def benchmarks_section(data: ReportData) -> SafeHtml:
    """Return the rows of benchmarks.csv, without empty columns."""
    rows = data.benchmarks
    names = [name for name in (rows[0] if rows else {}) if any(row.get(name) for row in rows)]
    if not names:
        return SafeHtml("")
    numeric = {i for i, name in enumerate(names) if all(_parse_number(row.get(name, "")) is not None for row in rows)}
    cells = [[_benchmark_cell(name, row.get(name, ""), i in numeric) for i, name in enumerate(names)] for row in rows]
    header = [name.replace("_", " ") for name in names]
    return markup.table(header, cells, numeric, "Benchmarks", row_headers=False)


def _parse_number(value: str) -> float | None:
    """Return the number in a cell, NaN for an empty cell, None for text."""
    try:
        return float(value) if value else math.nan
    except ValueError:
        return None


def _benchmark_cell(name: str, value: str, numeric: bool) -> object:
    number = _parse_number(value)
    if numeric and number is not None:
        if name in ("accuracy", "mfu") and math.isfinite(number):
            return format_percent(number)
        return format_number(number) if math.isfinite(number) else ""
    return SafeHtml(f'<span class="nowrap">{escape_text(value)}</span>') if len(value) < _MAX_NOWRAP else value
