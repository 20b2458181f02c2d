"""Measure several tasks on one run, and store the results in `evaluation.json` of the run.

The data of all tasks is read first, so that a missing file or network is reported before anything is computed. Each
task is stored when it is done.
"""

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm_jax.evaluation.contamination import (
    Contamination,
    clean_metrics,
    contamination_metrics,
    describe,
    run_contamination,
)
from slm_jax.evaluation.datasets import HubLoader
from slm_jax.evaluation.loading import LoadedTask, Subject, load_task
from slm_jax.evaluation.results import TaskResult
from slm_jax.evaluation.scoring import Scorer
from slm_jax.evaluation.specs import TaskSpec, parse_tasks
from slm_jax.run.directory import Run
from slm_jax.run.load import LoadedRun, load_run
from slm_jax.run.results import is_share, read_evaluation, update_evaluation
from slm_jax.run.selection import Step, select_checkpoint
from slm_jax.utils.errors import UserError, user_message
from slm_jax.utils.formatting import text_table
from slm_jax.utils.progress import show_log
from slm_jax.utils.waiting import waiting

logger = logging.getLogger(__name__)

DEFAULT_TASKS = ("heldout", "blimp", "lambada")
MAX_TOKENS = 1_000_000  # of held-out text


@dataclass(frozen=True)
class Evaluation:
    """Results of `evaluate`.

    Attributes:
        rows: As in `evaluation.json`, one for each task, group and metric.
        tasks: For each task the origin of its data, the method, the options, the duration in seconds, dtype and step.
        missing: Tasks that could not be measured, and why.
        unstored: Tasks whose results could not be written to `evaluation.json`, and why.
    """

    rows: list[dict[str, Any]]
    tasks: dict[str, dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)
    unstored: dict[str, str] = field(default_factory=dict)

    def value(self, task: str, metric: str, group: str = "all") -> float:
        """Return one value.

        Raises:
            KeyError: It was not measured.
        """
        for row in self.rows:
            if (row["task"], row["metric"], row["group"]) == (task, metric, group):
                return row["value"]
        raise KeyError((task, metric, group))


def evaluate(
    run: str | Path | LoadedRun | None = None,
    tasks: Sequence[str] = (),
    *,
    step: Step = None,
    context: int = 0,
    stride: int = 0,
    max_items: int = 0,
    max_tokens: int = MAX_TOKENS,
    batch_tokens: int = 0,
    contamination: bool = False,
    save: bool = True,
) -> Evaluation:
    """Measure tasks on the model of a run and store the results in its `evaluation.json`.

    A task that cannot be measured, for lack of a network or a file, is logged and added to `Evaluation.missing`; the
    others are still measured. Results that cannot be stored are logged and named in `Evaluation.unstored`.

    Args:
        run: A run directory or a loaded run; None: the newest run in runs/.
        tasks: Arguments as for `parse_tasks`; empty: `DEFAULT_TASKS`.
        step: The checkpoint, see `load_run`; of a run that is not loaded.
        context: Maximum number of input tokens; 0: the trained length.
        stride: Tokens that each further window of a long text scores; 0: half the context.
        max_items: Maximum number of records of each data set, a random subset with a fixed seed; 0: all.
        max_tokens: Maximum number of tokens of held-out text; 0: all.
        batch_tokens: Tokens per batch; 0: a default for the device.
        contamination: Also find the items that the training text of the run contains in part (see `contamination`),
            and add their share and the metrics of the others.
        save: Store the results in the run.

    Returns:
        The results.

    Raises:
        UserError: The run cannot be loaded, a task is unknown, or `evaluation.json` is damaged.
    """
    show_log()
    specs = parse_tasks(tasks or DEFAULT_TASKS)
    loaded = run if isinstance(run, LoadedRun) else load_run(None if run is None else str(run), step=step)
    logger.info("run %s, %s", loaded.run.path, loaded.step_text)
    if save:
        read_evaluation(loaded.run.path)  # report a damaged file before anything is measured
    scorer = Scorer(loaded.model, context or loaded.context, stride, batch_tokens)
    options = {"context": scorer.context, "stride": scorer.stride, "max_items": max_items, "max_tokens": max_tokens}
    evaluation = Evaluation([], {})
    subject = Subject(loaded.model, loaded.tokenizer, loaded.run, scorer, verbose=True)
    tasks_with_data = _load_tasks(specs, loaded, max_items, max_tokens, evaluation)
    contaminated = _find_contaminated(tasks_with_data, loaded) if contamination else {}
    for task in tasks_with_data:
        try:
            rows, about = _measure(task, subject, loaded, options, contaminated.get(task.spec.title))
        except UserError as error:
            _add_missing(evaluation, task.spec, error)
            continue
        evaluation.rows.extend(rows)
        evaluation.tasks[task.spec.title] = about
        if save:
            try:
                update_evaluation(loaded.run.path, task.spec.title, rows, about)
            except (UserError, OSError) as error:
                reason = user_message(error) or str(error)
                evaluation.unstored[task.spec.title] = reason
                logger.warning("%s: measured, but not stored: %s", task.spec.title, reason)
    return evaluation


def _load_tasks(
    specs: Sequence[TaskSpec], loaded: LoadedRun, max_items: int, max_tokens: int, evaluation: Evaluation
) -> list[LoadedTask]:
    """Return the tasks whose data can be read; the others are added to `Evaluation.missing`."""
    hub = HubLoader()
    tasks = []
    for spec in specs:
        try:
            tasks.append(load_task(spec, hub, max_items, max_tokens, loaded.config.data))
        except UserError as error:
            _add_missing(evaluation, spec, error)
    return tasks


def _add_missing(evaluation: Evaluation, spec: TaskSpec, error: UserError) -> None:
    evaluation.missing[spec.title] = str(error)
    logger.warning("%s: not measured: %s", spec.title, error)


def _find_contaminated(tasks: Sequence[LoadedTask], loaded: LoadedRun) -> dict[str, Contamination]:
    """Return the contamination of each task whose items have texts, by title. Raises UserError without a corpus."""
    searched = [task for task in tasks if task.texts]
    found = run_contamination([task.texts for task in searched], loaded.run, loaded.tokenizer)
    return {task.spec.title: each for task, each in zip(searched, found, strict=True)}


def _measure(
    task: LoadedTask,
    subject: Subject,
    loaded: LoadedRun,
    options: dict[str, Any],
    contamination: Contamination | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of a task, and its entry under "tasks" in evaluation.json."""
    spec = task.spec
    start = time.perf_counter()
    with waiting(f"{spec.title}: {task.size}"):
        subject.memory = None if contamination is None else {}
        result = task.measure(subject)
        if contamination is not None:
            result = _with_contamination(task, subject, result, contamination)
    about = {
        "data": result.origin or task.origin,
        "file": spec.path,
        "note": result.note,
        **options,
        "seconds": round(time.perf_counter() - start, 3),
        "dtype": str(loaded.model.dtype),
        "step": loaded.step,
    }
    return _result_rows(spec.title, result, loaded.step), about


def _with_contamination(
    task: LoadedTask, subject: Subject, result: TaskResult, contamination: Contamination
) -> TaskResult:
    """Return a result with the share of contaminated items and the metrics of the others."""
    found = contamination.found
    metrics = [*result.metrics, *contamination_metrics(found, task.parts)]
    if not found.all():
        clean = task.measure(subject, ~found) if found.any() else result
        metrics += clean_metrics(clean, task.parts)
    return TaskResult(metrics, f"{result.note}; {describe(contamination)}", result.origin)


def _result_rows(title: str, result: TaskResult, step: int) -> list[dict[str, Any]]:
    now = time.time()
    rows = []
    for metric in result.metrics:
        row: dict[str, Any] = {"task": title, "group": metric.group, "metric": metric.name}
        row |= metric.estimate._asdict()
        row |= {"count": metric.count, "step": step, "time": now}
        if metric.reference:
            row["reference"] = metric.reference
        rows.append(row)
    return rows


def unmeasured_tasks(run: Run, tasks: Sequence[str]) -> list[str]:
    """Return those task arguments that were not yet measured on a run's model with the default options.

    Raises:
        UserError: A task is unknown, or `evaluation.json` is damaged.
    """
    measured = read_evaluation(run.path).tasks
    options = {
        "step": select_checkpoint(run).step,
        "context": run.read_config().train.sequence_length,
        "max_items": 0,
        "max_tokens": MAX_TOKENS,
    }
    remaining = []
    for spec in parse_tasks(tasks):
        wanted = options | {"file": spec.path}
        if not wanted.items() <= measured.get(spec.title, {}).items():
            remaining.append(spec.argument)
    return remaining


def format_table(rows: Sequence[dict[str, Any]], all_groups: bool = False) -> str:
    """Format result rows as a text table.

    Args:
        rows: Rows as in `Evaluation.rows`.
        all_groups: Include the smallest groups (BLiMP's 67 paradigms).
    """
    cells = [("task", "group", "metric", "value", "95 % interval", "items", "references")]
    for row in rows:
        if row["group"].count(" / ") >= 2 and not all_groups:
            continue
        low, high = row["low"], row["high"]
        interval = ""
        if low is not None:
            interval = f"{_format_value(row['metric'], low)} – {_format_value(row['metric'], high)}"
        value = _format_value(row["metric"], row["value"])
        reference = row.get("reference", "")
        cells.append((row["task"], row["group"], row["metric"], value, interval, f"{row['count']:,}", reference))
    return text_table(cells, right={3, 4, 5})


def _format_value(metric: str, value: float) -> str:
    if is_share(metric):
        return f"{100 * value:.1f} %"
    if metric in ("loss", "bits_per_byte", "core"):
        return f"{value:.4f}"
    if value >= 1e6:
        return f"{value:.3g}"
    return re.sub(r"\.?0+$", "", f"{value:,.2f}")  # without trailing zeros
