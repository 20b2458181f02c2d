"""What a terminal shows of a report."""

from collections.abc import Iterator, Sequence

from slm_jax.report.axes import figure, span
from slm_jax.report.compare import HEAD, cautions, names_of, ranked, table_rows
from slm_jax.report.run_data import Subject
from slm_jax.report.scores import task_title
from slm_jax.report.sections import notes
from slm_jax.run.metrics import scores_text


def of_one(subject: Subject) -> Iterator[str]:
    """A run in a few lines."""
    yield f"{subject.name}: {subject.state}"
    columns, last = subject.columns, subject.last
    if subject.scores:
        yield f"validation: {scores_text(subject.scores)}"
    if len(columns):
        speed = figure(round(columns["input_tokens"].sum() / max(columns.end["seconds"], 1e-9)))
        yield (
            f"{last.parameters:,} parameters, {columns.end['tokens']:,.0f} tokens predicted in "
            f"{span(columns.end['seconds'])} ({speed} tokens a second), {subject.flops:.2e} FLOPs"
        )
    for row in subject.evaluation:
        if row["group"] in ("", "all"):
            yield f"{task_title(row, subject)} {str(row.get('metric', '')).replace('_', ' ')}: {figure(row['value'])}"
    yield from (f"note: {note}" for note in notes(subject))


def of_several(subjects: list[Subject]) -> Iterator[str]:
    """Runs as a table, the best first."""
    subjects = ranked(subjects)
    names = names_of(subjects)
    yield from text_table(HEAD, list(table_rows(subjects, names)), left={0, len(HEAD) - 1})
    yield from (f"note: {note}" for note in cautions(subjects, names))


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: set[int]) -> Iterator[str]:
    """Columns that stand right but for those in `left`."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join(cells).rstrip()
