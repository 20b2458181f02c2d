"""The summary of a report on the terminal."""

from collections.abc import Iterator

from slm_jax.report.axes import format_duration, format_number
from slm_jax.report.compare import HEADER, comparison_notes, ranked, run_names, table_rows
from slm_jax.report.run_data import ReportData
from slm_jax.report.scores import is_complete_task, metric_text, task_title, value_with_interval
from slm_jax.report.sections import notes
from slm_jax.run.metrics import scores_text
from slm_jax.utils.formatting import text_table


def run_summary(data: ReportData) -> Iterator[str]:
    """Yield a few lines about a run."""
    yield f"{data.name}: {data.state}"
    if data.scores:
        yield f"validation: {scores_text(data.scores)}"
    columns = data.columns
    if len(columns):
        seconds = columns.end["seconds"]
        speed = format_number(round(columns["input_tokens"].sum() / max(seconds, 1e-9)))
        yield (
            f"{data.last.num_parameters:,} parameters, {columns.end['tokens']:,.0f} tokens predicted in "
            f"{format_duration(seconds)} ({speed} tokens/s), {data.flops:.2e} FLOPs"
        )
    for row in data.evaluation:
        if is_complete_task(row):
            yield f"{task_title(row, data)} {metric_text(row)}: {value_with_interval(row)}"
    for note in notes(data):
        yield f"note: {note}"


def comparison_summary(runs: list[ReportData]) -> Iterator[str]:
    """Yield a table of runs, the best first, and notes about their comparability."""
    runs = ranked(runs)
    names = run_names(runs)
    last = len(HEADER) - 1
    yield text_table([HEADER, *table_rows(runs, names)], right=range(1, last))
    for note in comparison_notes(runs, names):
        yield f"note: {note}"
