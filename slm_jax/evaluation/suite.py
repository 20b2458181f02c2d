"""Measure several tasks on one run, and store the results in `evaluation.json` of the run.

The data of all tasks is read first, so that a missing file or network is reported before anything is computed. Each
task is stored when it is done.
"""

import difflib
import functools
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.data.sources.files import find_files
from slm_jax.evaluation import analogies, heldout
from slm_jax.evaluation.datasets import Dataset, HubLoader, read_files
from slm_jax.evaluation.registry import CHAT_TASKS, TASKS
from slm_jax.evaluation.replies import Replier
from slm_jax.evaluation.results import TaskResult
from slm_jax.evaluation.scoring import Scorer
from slm_jax.run.directory import Run
from slm_jax.run.load import LoadedRun, load_run
from slm_jax.run.results import is_share, read_evaluation, update_evaluation
from slm_jax.run.selection import Step, select_checkpoint
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural, text_table
from slm_jax.utils.progress import show_log
from slm_jax.utils.waiting import waiting

logger = logging.getLogger(__name__)

DEFAULT_TASKS = ("heldout", "blimp", "lambada")
SPECIAL_TASKS = {  # tasks that are not computed from records; the others are in registry.py
    "heldout": "held-out text of the run (or heldout=FILE): loss, perplexity, bits per byte, accuracy",
    "analogies": "word analogies by the embeddings (analogies=FILE, in the format of word2vec's questions-words.txt)",
}
MAX_TOKENS = 1_000_000  # of held-out text
_SEED = 0  # of the random subset for max_items


@dataclass(frozen=True)
class Evaluation:
    """Results of `evaluate`.

    Attributes:
        rows: As in `evaluation.json`, one for each task, group and metric.
        tasks: For each task the origin of its data, the method, the options, the duration in seconds, dtype and step.
        missing: Tasks that could not be measured, and why.
    """

    rows: list[dict[str, Any]]
    tasks: dict[str, dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)

    def value(self, task: str, metric: str, group: str = "all") -> float:
        """Return one value.

        Raises:
            KeyError: It was not measured.
        """
        for row in self.rows:
            if (row["task"], row["metric"], row["group"]) == (task, metric, group):
                return row["value"]
        raise KeyError((task, metric, group))


class TaskSpec(NamedTuple):
    """A requested task: NAME, NAME=FILE, or NAME:LABEL=FILE for several data sets of one task."""

    name: str
    label: str
    path: str

    @property
    def argument(self) -> str:
        """The form that `parse_tasks` accepts."""
        return f"{self.title}={self.path}" if self.path else self.title

    @property
    def title(self) -> str:
        """The name in result rows."""
        return f"{self.name}:{self.label}" if self.label else self.name


def parse_tasks(arguments: Sequence[str]) -> list[TaskSpec]:
    """Parse task arguments, each of which may hold several separated by commas.

    Raises:
        UserError: A task is unknown or requested twice, or its file is missing.
    """
    specs = []
    for argument in (part.strip() for text in arguments for part in text.split(",")):
        if argument:
            specs.append(_parse_task(argument))
    if arguments and not specs:
        known = ", ".join([*SPECIAL_TASKS, *TASKS, *CHAT_TASKS])
        raise UserError(f"--tasks names no task: give some of {known}, or omit the option")
    titles = [spec.title for spec in specs]
    repeated = [title for title in titles if titles.count(title) > 1]
    if repeated:
        title = repeated[0]
        raise UserError(f"--tasks: {title} is given twice: distinguish them with a label, {title}:LABEL=FILE")
    return specs


def _parse_task(argument: str) -> TaskSpec:
    known = [*SPECIAL_TASKS, *TASKS, *CHAT_TASKS]
    title, _, path = argument.partition("=")
    name, _, label = title.partition(":")
    if argument.endswith("=") and not path:
        raise UserError(f"--tasks {argument}: the path of the file is empty")
    if name not in known:
        similar = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise UserError(f"--tasks: unknown task {name} (known: {', '.join(known)}){hint}")
    if not path and (name in ("analogies", "choices") or label):
        raise UserError(f"--tasks {title} needs a file: {title}=FILE")
    if path:
        try:
            find_files((path,))
        except UserError as error:
            raise UserError(f"--tasks {argument}: {str(error).removeprefix('data.files: ')}") from None
    return TaskSpec(name, label, path)


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
    save: bool = True,
) -> Evaluation:
    """Measure tasks on the model of a run and store the results in its `evaluation.json`.

    A task that cannot be measured, for lack of a network or a file, is logged and added to `Evaluation.missing`; the
    others are still measured.

    Args:
        run: A run directory or a loaded run; None: the newest run in runs/.
        tasks: Arguments as for `parse_tasks`; empty: `DEFAULT_TASKS`.
        step: The checkpoint, see `load_run`; of a run that is not loaded.
        context: Maximum number of input tokens; 0: the trained length.
        stride: Tokens that each further window of a long text scores; 0: half the context.
        max_items: Maximum number of records of each data set, a random subset with a fixed seed; 0: all.
        max_tokens: Maximum number of tokens of held-out text; 0: all.
        batch_tokens: Tokens per batch; 0: a default for the device.
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
    hub = HubLoader()
    make_replier = functools.cache(lambda: Replier(loaded.model, loaded.tokenizer, scorer.context))
    prepared: list[PreparedTask] = []
    for spec in specs:
        try:
            if spec.name in CHAT_TASKS:
                prepared.append(_prepare_chat(spec, make_replier(), max_items))
            else:
                prepared.append(_prepare(spec, loaded, scorer, hub, max_items, max_tokens))
        except UserError as error:
            _add_missing(evaluation, spec, error)
    for task in prepared:
        try:
            rows, about = _measure(task, loaded, options)
        except UserError as error:
            _add_missing(evaluation, task.spec, error)
            continue
        evaluation.rows.extend(rows)
        evaluation.tasks[task.spec.title] = about
        if save:
            update_evaluation(loaded.run.path, task.spec.title, rows, about)
    return evaluation


def _add_missing(evaluation: Evaluation, spec: TaskSpec, error: UserError) -> None:
    evaluation.missing[spec.title] = str(error)
    logger.warning("%s: not measured: %s", spec.title, error)


class PreparedTask(NamedTuple):
    """A task whose data is in memory: its origin, the number of its items, and a function that measures it."""

    spec: TaskSpec
    origin: str
    num_items: int
    measure: Callable[[], TaskResult]


def _prepare(
    spec: TaskSpec, loaded: LoadedRun, scorer: Scorer, hub: HubLoader, max_items: int, max_tokens: int
) -> PreparedTask:
    """Read the data of a task. Raises UserError if that fails."""
    tokenizer = loaded.tokenizer
    if spec.name == "heldout":
        if spec.path:
            documents = heldout.documents_of_files(spec.path, tokenizer, max_tokens)
        else:
            documents = heldout.documents_of_run(loaded.run, tokenizer, max_tokens)
        measure = functools.partial(
            heldout.measure_heldout, documents, tokenizer, scorer.score, scorer.context, scorer.stride
        )
        return PreparedTask(spec, ", ".join(documents.sources), len(documents.items), measure)
    if spec.name == "analogies":
        questions = analogies.read_questions(spec.path)
        questions = questions.select(_subset(list(range(len(questions.sections))), max_items))
        embedding_VxD = np.asarray(loaded.model.embedding[...])[: loaded.model.vocab_size]
        measure = functools.partial(analogies.measure_analogies, questions, tokenizer, embedding_VxD)
        return PreparedTask(spec, spec.path, len(questions.sections), measure)
    task = TASKS[spec.name]
    dataset = read_files(spec.path, task.columns) if spec.path else _load_from_hub(spec.name, hub)
    records = _subset(dataset.records, max_items)
    measure = functools.partial(task.measure, records, tokenizer, scorer.score)
    return PreparedTask(spec, dataset.origin, len(records), measure)


def _prepare_chat(spec: TaskSpec, replier: Replier, max_items: int) -> PreparedTask:
    """Read the conversations of a task. Raises UserError if that fails."""
    task = CHAT_TASKS[spec.name]
    dataset = read_files(spec.path, task.columns) if spec.path else task.records()
    records = _subset(dataset.records, max_items)
    return PreparedTask(spec, dataset.origin, len(records), functools.partial(task.measure, records, replier.reply))


def _load_from_hub(name: str, hub: HubLoader) -> Dataset:
    task = TASKS[name]
    assert task.hub is not None  # parse_tasks requires a file for the others
    return hub.load(name, task.hub, task.columns)


def _subset(items: list[Any], max_items: int) -> list[Any]:
    """Return at most `max_items` items (0: all), a random subset in order, always the same."""
    if not max_items or len(items) <= max_items:
        return items
    chosen = np.random.default_rng(_SEED).permutation(len(items))[:max_items]
    return [items[i] for i in np.sort(chosen)]


def _measure(
    task: PreparedTask, loaded: LoadedRun, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of a task, and its entry under "tasks" in evaluation.json."""
    spec = task.spec
    start = time.perf_counter()
    noun = "document" if spec.name == "heldout" else "conversation" if spec.name in CHAT_TASKS else "record"
    with waiting(f"{spec.title}: {plural(task.num_items, noun)}"):
        result = task.measure()
    about = {
        "data": task.origin,
        "file": spec.path,
        "note": result.note,
        **options,
        "seconds": round(time.perf_counter() - start, 3),
        "dtype": str(loaded.model.dtype),
        "step": loaded.step,
    }
    return _result_rows(spec.title, result, loaded.step), about


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
    if metric in ("loss", "bits_per_byte"):
        return f"{value:.4f}"
    if value >= 1e6:
        return f"{value:.3g}"
    return re.sub(r"\.?0+$", "", f"{value:,.2f}")  # without trailing zeros
