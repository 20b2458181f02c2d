"""Several tasks on one run: their sets are fetched, then measured, then kept in `evaluation.json` of the run."""

import difflib
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.data.sources.files import matching_files
from slm_jax.evaluation import analogies, heldout
from slm_jax.evaluation.datasets import Hub, Rows, read_files
from slm_jax.evaluation.registry import TASKS
from slm_jax.evaluation.results import Measured
from slm_jax.evaluation.scoring import Scorer
from slm_jax.run.directory import Run
from slm_jax.run.load import LoadedRun, load_run
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import locked_file, replace_text
from slm_jax.utils.formatting import plural
from slm_jax.utils.progress import waiting

DEFAULT = ("heldout", "blimp", "lambada")
OWN = {
    "heldout": "the run's held-out text (or heldout=FILE): loss, perplexity, bits per byte, accuracy",
    "analogies": "word analogies by the embeddings (analogies=FILE, as questions-words.txt of word2vec)",
}
MAX_TOKENS = 1_000_000  # of held-out text
_SEED = 0  # of which items --max_items takes


@dataclass(frozen=True)
class Evaluation:
    """What was measured. rows: as in `evaluation.json`, one for each task, group and metric."""

    rows: list[dict[str, Any]]
    tasks: dict[str, dict[str, Any]]  # of each: where the set is from, how it was measured, options, seconds, dtype
    missing: dict[str, str] = field(default_factory=dict)  # tasks that could not be measured, and why

    def value(self, task: str, metric: str, group: str = "all") -> float:
        """One figure. Raises KeyError if it was not measured."""
        for row in self.rows:
            if (row["task"], row["metric"], row["group"]) == (task, metric, group):
                return row["value"]
        raise KeyError((task, metric, group))


class Spec(NamedTuple):
    """A task as it is asked for: NAME, NAME=FILE, or NAME:LABEL=FILE (several sets of one kind)."""

    name: str
    label: str
    path: str

    @property
    def word(self) -> str:
        """As `parse_tasks` takes it."""
        return f"{self.title}={self.path}" if self.path else self.title

    @property
    def title(self) -> str:
        """What its rows are called."""
        return f"{self.name}:{self.label}" if self.label else self.name


def parse_tasks(words: Sequence[str]) -> list[Spec]:
    """Task words, also several in one with commas between. Raises UserError for unknown ones and files that are not
    there."""
    known = [*OWN, *TASKS]
    specs = []
    for word in filter(None, (part.strip() for text in words for part in text.split(","))):
        head, _, path = word.partition("=")
        name, _, label = head.partition(":")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; perhaps you meant {near[0]}" if near else ""
            raise UserError(f"--tasks: there is no task {name} ({', '.join(known)}){hint}")
        if not path and (name in ("analogies", "choices") or label):
            raise UserError(f"--tasks {head} needs a file: {head}=FILE")
        if path:
            try:
                matching_files((path,))
            except UserError as error:
                raise UserError(f"--tasks {word}: {str(error).removeprefix('data.files: ')}") from None
        specs.append(Spec(name, label, path))
    if words and not specs:
        raise UserError(f"--tasks names no task: give some of {', '.join(known)}, or leave it out")
    titles = [spec.title for spec in specs]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise UserError(f"--tasks: {twice[0]} is asked for twice: tell them apart with a label, {twice[0]}:LABEL=FILE")
    return specs


def evaluate(
    run: str | Path | LoadedRun | None = None,
    tasks: Sequence[str] = (),
    *,
    context: int = 0,
    stride: int = 0,
    max_items: int = 0,
    max_tokens: int = MAX_TOKENS,
    batch_tokens: int = 0,
    save: bool = True,
    say: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure a run's newest model (default: of the newest run) and keep the figures in its `evaluation.json`.

    tasks: words as `parse_tasks` takes; none: `DEFAULT`. context: tokens seen at most, 0: the trained length. stride:
    of windows, 0: half the context. max_items: of each set at most so many rows, drawn by a fixed seed, 0: all.
    max_tokens: the same for held-out text, 0: all. batch_tokens: computed at once, 0: as suits the device.

    What cannot be measured, for want of a network or of files, is told and left in `Evaluation.missing`; the rest goes
    on. Raises UserError for a run or a task that is not there.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    specs = parse_tasks(tasks or DEFAULT)
    loaded = run if isinstance(run, LoadedRun) else load_run(str(run) if run is not None else None)
    if save:
        _read(loaded.run)  # damage is told before anything is measured
    scorer = Scorer(loaded.model, context or loaded.context, stride, batch_tokens)
    options = {"context": scorer.context, "stride": scorer.stride, "max_items": max_items, "max_tokens": max_tokens}
    missing: dict[str, str] = {}
    ready = list(_fetch(specs, loaded, scorer, Hub(say), max_items, max_tokens, missing, say))
    rows: list[dict[str, Any]] = []
    about: dict[str, dict[str, Any]] = {}
    for spec, origin, count, measure in ready:
        begin = time.perf_counter()
        try:
            with waiting(f"{spec.title}: {plural(count, 'document' if spec.name == 'heldout' else 'row')}"):
                measured = measure()
        except UserError as error:
            missing[spec.title] = str(error)
            say(f"{spec.title}: not measured: {error}")
            continue
        found = _rows(spec.title, measured, loaded.step)
        rows += found
        about[spec.title] = {
            "data": origin,
            "file": spec.path,
            "note": measured.note,
            **options,
            "seconds": round(time.perf_counter() - begin, 3),
            "dtype": str(loaded.model.dtype),
            "step": loaded.step,
        }
        if save:
            _write(loaded.run, spec.title, found, about[spec.title])
    return Evaluation(rows, about, missing)


Ready = tuple[Spec, str, int, Callable[[], Measured]]


def _fetch(
    specs: Sequence[Spec],
    loaded: LoadedRun,
    scorer: Scorer,
    hub: Hub,
    max_items: int,
    max_tokens: int,
    missing: dict[str, str],
    say: Callable[[str], None],
) -> Iterator[Ready]:
    """(task, where its set is from, items, how to measure it), all read before anything is computed."""
    for spec in specs:
        try:
            if spec.name == "heldout":
                documents = (
                    heldout.documents_of_files(spec.path, loaded.tokenizer, max_tokens)
                    if spec.path
                    else heldout.documents_of_run(loaded.run, loaded.tokenizer, max_tokens)
                )
                measure = functools.partial(
                    heldout.measure_heldout, documents, loaded.tokenizer, scorer.score, scorer.context, scorer.stride
                )
                yield spec, ", ".join(documents.sources), len(documents.items), measure
            elif spec.name == "analogies":
                questions = analogies.read_questions(spec.path)
                questions = questions.take(_some(list(range(len(questions.sections))), max_items))
                embedding_VxD = np.asarray(loaded.model.embedding[...])[: loaded.model.vocab_size]
                measure = functools.partial(analogies.measure_analogies, questions, loaded.tokenizer, embedding_VxD)
                yield spec, spec.path, len(questions.sections), measure
            else:
                task = TASKS[spec.name]
                found = read_files(spec.path, task.columns) if spec.path else _from_hub(spec.name, hub)
                rows = _some(found.rows, max_items)
                measure = functools.partial(task.measure, rows, loaded.tokenizer, scorer.score)
                yield spec, found.origin, len(rows), measure
        except UserError as error:
            missing[spec.title] = str(error)
            say(f"{spec.title}: not measured: {error}")


def _from_hub(name: str, hub: Hub) -> Rows:
    task = TASKS[name]
    assert task.hub is not None
    return hub.read(name, task.hub, task.columns)


def _some(rows: list[Any], most: int) -> list[Any]:
    """At most so many rows, spread over all of them, always the same."""
    if not most or len(rows) <= most:
        return rows
    chosen = np.random.default_rng(_SEED).permutation(len(rows))[:most]
    return [rows[i] for i in np.sort(chosen)]


def _rows(title: str, measured: Measured, step: int) -> list[dict[str, Any]]:
    now = time.time()
    rows = []
    for figure in measured.figures:
        row: dict[str, Any] = {"task": title, "group": figure.group, "metric": figure.metric}
        row |= figure.estimate._asdict() | {"count": figure.count, "step": step, "time": now}
        rows.append(row | ({"reference": figure.reference} if figure.reference else {}))
    return rows


def results_path(run: Run) -> Path:
    """Where the figures of a run are kept."""
    return run.path / "evaluation.json"


def unmeasured(run: Run, tasks: Sequence[str]) -> list[str]:
    """Those of the tasks that were not measured, with the default options, of a run's newest model. Raises UserError if
    the file is damaged."""
    kept = _read(run)["tasks"]
    wanted = {"step": run.newest_step(), "context": run.read_config().train.sequence_length}
    wanted |= {"max_items": 0, "max_tokens": MAX_TOKENS}
    return [
        spec.word
        for spec in parse_tasks(tasks)
        if not (wanted | {"file": spec.path}).items() <= kept.get(spec.title, {}).items()
    ]


def _read(run: Run) -> dict[str, Any]:
    """What was measured before. Raises UserError if the file is damaged."""
    path = results_path(run)
    if not path.is_file():
        return {"results": [], "tasks": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        results, tasks = list(found["results"]), dict(found.get("tasks", {}))
        if not all(isinstance(row, dict) and "task" in row for row in results):
            raise ValueError("a result is of no task")
        if not all(isinstance(about, dict) for about in tasks.values()):
            raise ValueError("what is noted of a task is no object")
        return {"results": results, "tasks": tasks}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, it is made again by measuring again") from None


def _write(run: Run, title: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """The new figures of a task in place of its old ones, beside those of others, which other processes may measure."""
    with locked_file(run.path / ".evaluation.lock"):
        kept = _read(run)
        others = [row for row in kept["results"] if row["task"] != title]
        whole = {"results": [*others, *rows], "tasks": {**kept["tasks"], title: about}}
        replace_text(results_path(run), json.dumps(whole, indent=1, allow_nan=False) + "\n")


def table(rows: Sequence[dict[str, Any]], every_group: bool = False) -> str:
    """Figures as text: task, group, metric, value with its 95 % interval, items, references. Without every_group those
    of the smallest parts (BLiMP's 67 paradigms) are left out."""
    shown = [row for row in rows if every_group or row["group"].count(" / ") < 2]
    cells = [("task", "group", "metric", "value", "95 % interval", "items", "others")]
    for row in shown:
        low, high = row["low"], row["high"]
        form = functools.partial(_number, row["metric"])
        interval = "" if low is None else f"{form(low)} – {form(high)}"
        count = f"{row['count']:,}"
        cells.append(
            (row["task"], row["group"], row["metric"], form(row["value"]), interval, count, row.get("reference", ""))
        )
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = {3, 4, 5}
    lines = []
    for line in cells:
        pairs = enumerate(zip(line, sizes, strict=True))
        lines.append("  ".join(text.rjust(size) if i in right else text.ljust(size) for i, (text, size) in pairs))
    return "\n".join(line.rstrip() for line in lines)


def _number(metric: str, value: float) -> str:
    if "accuracy" in metric:
        return f"{100 * value:.1f} %"
    if metric in ("loss", "bits_per_byte"):
        return f"{value:.4f}"
    return re.sub(r"\.?0+$", "", f"{value:,.2f}") if value < 1e6 else f"{value:.3g}"
