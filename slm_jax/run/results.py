"""Files with results of a run or a curriculum: `evaluation.json`, `stage_scores.json` and `benchmarks.csv`.

This module has the only writer and the only reader of each file. What the numbers mean is defined where they are
measured: `slm_jax.evaluation` and `slm_jax.curriculum`.
"""

import contextlib
import csv
import errno
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from slm_jax.utils.errors import UserError, is_disk_full
from slm_jax.utils.files import locked_file, replace_text

Row = dict[str, Any]

EVALUATION = "evaluation.json"  # in a run
STAGE_SCORES = "stage_scores.json"  # in a curriculum
BENCHMARKS = "benchmarks.csv"  # in a run or in a curriculum


@dataclass(frozen=True)
class SavedEvaluation:
    """Contents of `evaluation.json`.

    Attributes:
        results: One row for each task, group and metric: `task`, `group`, `metric`, `value`, `low`, `high`, `count`,
            `step`, `time` and sometimes `reference`.
        tasks: For each task the data and settings that it was measured with.
    """

    results: list[Row] = field(default_factory=list)
    tasks: dict[str, Row] = field(default_factory=dict)


def is_share(metric: str) -> bool:
    """Return whether a metric is a share, which is shown as a percentage: its name has accuracy, or ends with share."""
    return "accuracy" in metric or metric.endswith("_share")


def read_evaluation(folder: Path) -> SavedEvaluation:
    """Return the evaluation results of a run; empty if it was never evaluated.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / EVALUATION
    if not path.is_file():
        return SavedEvaluation()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = list(content["results"])
        tasks = dict(content.get("tasks", {}))
        if not all(isinstance(row, dict) and isinstance(row.get("task"), str) for row in results):
            raise ValueError("a result names no task")
        if not all(isinstance(about, dict) for about in tasks.values()):
            raise ValueError("the settings of a task are not an object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it and measure again with python -m slm_jax.evaluate"
        ) from None
    return SavedEvaluation(results, tasks)


def update_evaluation(folder: Path, task: str, rows: Sequence[Row], about: Row) -> None:
    """Replace the results of one task in the `evaluation.json` of a run and keep those of the others.

    The file is locked meanwhile, since other processes may be measuring other tasks.

    Args:
        folder: The run directory.
        task: The task's title.
        rows: The new results of the task.
        about: The data and settings that the task was measured with.

    Raises:
        UserError: The existing file is damaged, or the run cannot be written to.
        OSError: The disk is full.
    """
    with file_errors(folder / EVALUATION), locked_file(folder / ".evaluation.lock"):
        saved = read_evaluation(folder)
        others = [row for row in saved.results if row["task"] != task]
        content = {"results": [*others, *rows], "tasks": {**saved.tasks, task: about}}
        replace_text(folder / EVALUATION, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_stage_scores(folder: Path) -> list[Row]:
    """Return the stage scores of a curriculum: each stage's model on the held-out text of the stages.

    Returns:
        Rows with `after` (the stage whose model was measured), `text` (the stage whose held-out text was used), `step`
        and the scores; none before the first.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / STAGE_SCORES
    if not path.is_file():
        return []
    try:
        rows = list(json.loads(path.read_text(encoding="utf-8"))["results"])
        if not all({"after", "text", "step", "bits_per_byte"} <= row.keys() for row in rows):
            raise ValueError("a row has no stage or no score")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, it is created again") from None
    return rows


def write_stage_scores(folder: Path, rows: Sequence[Row]) -> None:
    """Replace the stage scores of a curriculum."""
    replace_text(folder / STAGE_SCORES, json.dumps({"results": list(rows)}, indent=1) + "\n")


@dataclass(frozen=True)
class Benchmark:
    """One row of `benchmarks.csv`.

    Scores are of the held-out text; `seconds` is the time of all steps and validations.
    """

    timestamp: str  # UTC, of the measured step
    stage: str  # of a curriculum; otherwise the name of the run
    model: str  # DIMxDEPTH
    device: str
    parameters: int
    dataset: str
    sequence_length: int  # tokens
    steps: int  # taken before the measurement
    items: int  # sequences trained on
    batch: int  # sequences per step
    tokens: int  # predicted in training
    seconds: float
    loss: float  # nats per token; of a DPO run those of the chosen responses
    perplexity: float
    accuracy: float  # of next tokens; NaN for a DPO run
    bits_per_byte: float
    train_loss: float  # of the last step; NaN if that was skipped, and for a DPO run
    tokens_per_second: float  # input tokens, also those that are not predicted; median over the steps
    mfu: float
    version: str  # of slm_jax
    jax: str
    config: str  # 12 hexadecimal digits of the options that the result depends on
    commit: str  # of the source tree, with + if files differ from it


BENCHMARK_COLUMNS = tuple(each.name for each in fields(Benchmark))
_TYPES = {each.name: each.type for each in fields(Benchmark)}
_KEY = ("stage", "steps", "timestamp")  # identifies a measurement


def append_benchmark(path: Path, row: Benchmark) -> bool:
    """Append a row, unless the file has one with the same stage, step and timestamp.

    Several processes may append to one file: it is locked while the row is written in a single call. An incomplete
    last line, left by a crash, is removed first; the header is written once.

    Args:
        path: The CSV file; created with its folder if missing.
        row: The row to append.

    Returns:
        Whether the row was appended.

    Raises:
        UserError: The file has other columns or cannot be written.
        OSError: The disk is full.
    """
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked_file(path) as descriptor:
            return _append(descriptor, path, row)


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Convert an OSError of writing a file to a UserError, except a full disk, which commands report themselves."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _append(descriptor: int, path: Path, row: Benchmark) -> bool:
    content = b""
    while block := os.pread(descriptor, 1 << 20, len(content)):
        content += block
    complete = content[: content.rfind(b"\n") + 1]
    if not complete and not _line(BENCHMARK_COLUMNS).encode().startswith(content):
        raise UserError(f"{path} is another file: give another --csv")
    text = complete.decode("utf-8", "replace")
    if any(all(old[name] == getattr(row, name) for name in _KEY) for old in _parse(text, path)):
        return False
    os.ftruncate(descriptor, len(complete))
    values = asdict(row)
    line = _line(values[name] for name in BENCHMARK_COLUMNS)
    data = (line if text else _line(BENCHMARK_COLUMNS) + line).encode()
    written = os.write(descriptor, data)  # one call: a reader sees the complete row or nothing
    if written != len(data):
        os.ftruncate(descriptor, len(complete))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    os.fsync(descriptor)
    return True


def _line(values: Iterable[Any]) -> str:
    buffer = io.StringIO()
    one_line = [" ".join(value.split()) if isinstance(value, str) else value for value in values]
    csv.writer(buffer, lineterminator="\n").writerow(one_line)
    return buffer.getvalue()


def read_benchmarks(path: Path) -> list[Row]:
    """Return the rows of a CSV file with their numbers converted; none if the file is missing.

    An incomplete last line is left out.

    Raises:
        UserError: The file cannot be read, has other columns, or a row is not a benchmark.
    """
    text = _read_text(path)
    return _parse(text[: text.rfind("\n") + 1], path)


def read_benchmark_cells(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as text by column name, whatever its columns are; none if the file is missing.

    Raises:
        UserError: The file cannot be read.
    """
    rows = csv.DictReader(io.StringIO(_read_text(path), newline=""), restval="")
    return [{str(name): str(value) for name, value in row.items() if name is not None} for row in rows]


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _parse(text: str, path: Path) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text))
    rows: list[Row] = []
    try:
        if text and tuple(reader.fieldnames or ()) != BENCHMARK_COLUMNS:
            raise ValueError("its columns are not those that this version writes")
        for cells in reader:
            rows.append({name: _typed(name, value) for name, value in cells.items()})
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path}, line {reader.line_num}, is not a benchmark ({error}): correct or remove it, or give another --csv"
        ) from None
    return rows


def _typed(name: str, value: Any) -> Any:
    if not isinstance(name, str) or not isinstance(value, str):
        raise ValueError("too few or too many columns")
    kind = _TYPES.get(name)
    if kind is float and not value:
        return math.nan  # earlier versions wrote the loss of a skipped step as an empty cell
    return kind(value) if kind in (int, float) else value
