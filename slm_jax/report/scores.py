"""What was measured: validation through training, the evaluation suite with its intervals, the benchmark rows."""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from slm_jax.report import escape, markup
from slm_jax.report.axes import compact, figure, percent, span
from slm_jax.report.escape import Safe
from slm_jax.report.run_data import Facts, Subject
from slm_jax.report.tokens import counts_of
from slm_jax.run.metrics import Row

VALIDATIONS = 30  # rows shown at once; the others can be unfolded


def validation(subject: Subject) -> Safe:
    """The scores on the held-out text, the newest first, with what guessing would give."""
    columns, staged = subject.columns, subject.is_curriculum
    if not columns.validations:
        return Safe("")
    stages = [facts.stage for facts in subject.stages for _ in facts.columns.validations]
    rows: list[tuple[str, ...]] = []
    for row, place, stage in zip(columns.validations, columns.validated_at().tolist(), stages, strict=True):
        seen, seconds = columns.x["tokens"][place], columns["seconds"][place]
        cells = (f"{int(row['step']):,}", *_scores(row), compact(float(seen)), span(float(seconds)))
        rows.append((*cells[:1], *[stage] * staged, *cells[1:]))
    rows = [*rows[::-1], *((*cells[:1], *[""] * staged, *cells[1:]) for cells in guesses(subject.last))]
    head = ["step", *["stage"] * staged]
    head += ["bits per byte", "loss", "perplexity", "accuracy", "tokens so far", "training time"]
    numbers = range(1 + staged, 7 + staged)
    shown, rest = rows[:VALIDATIONS], rows[VALIDATIONS:]
    parts = [markup.table(head, shown, numbers, "Validation scores")]
    if rest:
        parts.append(markup.folded(f"{len(rest)} more", markup.table(head, rest, numbers, "More scores")))
    return markup.joined(parts)


def _scores(row: Row) -> tuple[str, str, str, str]:
    return (
        f"{row['val_bits_per_byte']:.4f}",
        f"{row['val_loss']:.4f}",
        figure(row["val_perplexity"]),
        percent(row["val_accuracy"]),
    )


def guesses(facts: Facts) -> Iterator[tuple[str, ...]]:
    """The rows for guessing without a model, on the text that is validated on, for comparison."""
    validated, size = facts.validated, facts.vocab_size
    held_out, training = counts_of(validated, size), counts_of(facts.split("train"), size)
    if not validated or held_out is None or training is None or validated.has_prompts:
        return
    # One count more of each id: none is impossible.
    odds = (training + 1) / (training.sum() + size)
    share = held_out / held_out.sum()
    for name, loss, accuracy in (
        ("guessing by how common each token is", float(-(share * np.log(odds)).sum()), float(share[odds.argmax()])),
        ("guessing blindly", math.log(size), 1 / size),
    ):
        bits = loss / math.log(2) * len(validated) / validated.num_bytes
        yield (name, f"{bits:.4f}", f"{loss:.4f}", figure(math.exp(loss)), percent(accuracy), "", "")


def stages(subject: Subject) -> Safe:
    """Held-out bits per byte of each stage's text after each stage: what was taught, and what was forgotten."""
    found = {(str(row["after"]), str(row["text"])): row["bits_per_byte"] for row in subject.stage_scores}
    models, texts = (sorted({pair[i] for pair in found}) for i in range(2))
    best = {text: min(value for (_, of), value in found.items() if of == text) for text in texts}
    rows = []
    for model in models:
        row: list[object] = [f"after {model}"]
        for text in texts:
            value = found.get((model, text))
            shown = "" if value is None else f"{value:.4f}"
            row.append(Safe(f"<b>{shown}</b>") if value == best[text] else shown)
        rows.append(row)
    if not rows:
        return Safe("")
    note = markup.paragraph("Bits per byte of the held-out text of each stage; bold: the best of a column.", "muted")
    return markup.joined([note, markup.table(["model", *texts], rows, range(1, len(texts) + 1), "Stages")])


def evaluation(subject: Subject) -> Safe:
    """The tables of evaluation.json: whole tasks, and the parts of those that have parts."""
    rows = subject.evaluation
    if not rows:
        return Safe("")
    whole = [row for row in rows if row.get("group", "all") in ("", "all")]
    parts: dict[str, list[Row]] = {}
    for row in rows:
        if row not in whole:
            parts.setdefault(task_title(row, subject), []).append(row)
    found = [_evaluation_table(whole, subject, "all")] if whole else []
    for task, of_task in parts.items():
        found.append(markup.folded(f"{task}: {len(of_task)} parts", _evaluation_table(of_task, subject, "parts")))
    found.extend(_notes(subject))
    return markup.joined(found)


def task_title(row: Row, subject: Subject) -> str:
    """The task of a row of an evaluation, of a curriculum with the stage before it."""
    return f"{row['stage']}: {row['task']}" if subject.is_curriculum and row.get("stage") else str(row["task"])


def _evaluation_table(rows: list[Row], subject: Subject, what: str) -> Safe:
    whole, staged = what == "all", subject.is_curriculum
    ratios, refer = any(map(_is_share, rows)), any(row.get("reference") for row in rows)
    head: list[object] = ["task" if whole else "part", *["stage"] * staged, "metric", "value", "95 % interval"]
    head += [*["0 – 100 %"] * ratios, "items", "step", *["for comparison"] * refer]
    cells = []
    for row in rows:
        low, high = row.get("low"), row.get("high")
        interval = f"{_value(row, low)} – {_value(row, high)}" if _known(low) and _known(high) else ""
        metric = str(row.get("metric", "")).replace("_", " ")
        cell = [row["task"] if whole else row["group"], *[row.get("stage", "")] * staged, metric]
        cell += [_value(row, row["value"]), interval, *[_whisker(row)] * ratios]
        cell += [figure(row["count"]) if _known(row.get("count")) else "", _step(row)]
        cells.append(cell + [row.get("reference", "")] * refer)
    numbers = {i for i, name in enumerate(head) if name in ("value", "95 % interval", "items", "step")}
    return markup.table(head, cells, numbers, "Evaluation" if whole else "Evaluation by part")


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_share(row: Row) -> bool:
    return "accuracy" in str(row.get("metric", "")) and 0 <= row["value"] <= 1


def _value(row: Row, value: Any) -> str:
    return percent(value) if _is_share(row) else figure(value)


def _step(row: Row) -> str:
    return f"{row['step']:,}" if isinstance(row.get("step"), int) else ""


def _whisker(row: Row) -> Safe:
    """The value with its interval on a line from 0 to 100 %, and where chance is."""
    if not _is_share(row):
        return Safe("")
    at = lambda share: f"{2 + 136 * min(max(share, 0.0), 1.0):.1f}"  # noqa: E731
    low, high = row.get("low"), row.get("high")
    line = f'<path d="M{at(low)} 9H{at(high)}"/>' if _known(low) and _known(high) else ""
    chance = re.search(r"chance ([\d.]+) ?%", str(row.get("reference", "")))
    tick = f'<path class="ref" d="M{at(float(chance[1]) / 100)} 1V17"/>' if chance else ""
    return Safe(
        '<svg class="whisker" viewBox="0 0 140 18" aria-hidden="true"><path class="axis" d="M2 9H138M2 5V13M138 5V13"/>'
        f'{tick}{line}<circle cx="{at(row["value"])}" cy="9" r="4"/></svg>'
    )


def _notes(subject: Subject) -> Iterator[Safe]:
    """How each task was measured, as the evaluation noted it."""
    said = {task_title(row, subject): str(note) for row in subject.evaluation if (note := row["about"].get("note"))}
    if said:
        yield markup.folded("How these were measured", markup.facts_list(said.items()))


def benchmarks(subject: Subject) -> Safe:
    """The rows of benchmarks.csv, with the columns that hold anything."""
    rows = subject.benchmarks
    names = [name for name in (rows[0] if rows else {}) if any(row.get(name) for row in rows)]
    if not names:
        return Safe("")
    numeric = {i for i, name in enumerate(names) if all(_number(row.get(name, "")) is not None for row in rows)}
    cells = [[_cell(row.get(name, ""), i in numeric) for i, name in enumerate(names)] for row in rows]
    return markup.table([name.replace("_", " ") for name in names], cells, numeric, "Benchmarks", row_heads=False)


def _number(value: str) -> float | None:
    try:
        found = float(value) if value else math.nan
    except ValueError:
        return None
    return found


def _cell(value: str, numeric: bool) -> object:
    number = _number(value)
    if numeric and number is not None:
        return figure(number) if math.isfinite(number) else ""
    return Safe(f'<span class="nowrap">{escape.text(value)}</span>') if len(value) < 40 else value
