"""`metrics.jsonl` and `layers.jsonl` of a run: one JSON object per step, in order.

    {"step": 1, "loss": 7.62, "crc32": "0c5f1b2a"}

The last key is the CRC-32 of the line's text before `, "crc32"`, so that a changed digit is noticed. Earlier versions
wrote none: rows without it are accepted before the first row that has it. Damaged rows are reported and skipped.

This module has the only writer and the only reader of these files. `metrics.jsonl` has a row for every step; its fields
are listed in `slm_jax/training/README.md`. `layers.jsonl` has norms of each layer, every `log.layers` steps.
"""

import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from slm_jax.utils.files import replace_file
from slm_jax.utils.formatting import duration

logger = logging.getLogger(__name__)

Row = dict[str, Any]

_CHECKED = re.compile(rb'(.*), "crc32": "([0-9a-f]{8})"\}\n')


class RowLogger(Protocol):
    """A destination of metrics rows besides the file, such as TensorBoard; see `slm_jax.training.options.loggers`."""

    def log(self, row: Row) -> None:
        """Send a row."""

    def flush(self) -> None:
        """Make the rows so far durable: a checkpoint that includes them is about to be saved."""

    def close(self) -> None:
        """Send the remaining rows and release resources."""


def format_row(row: Row) -> str:
    """Return a row as a line with its check value.

    Raises:
        ValueError: A value is NaN or infinite, which JSON cannot represent.
    """
    text = json.dumps(row, allow_nan=False)[:-1]
    return f'{text}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'


def _parse_row(line: bytes, needs_check: bool) -> tuple[Row, bool]:
    """Return the row of a line, without its check value, and whether it has one.

    Raises:
        ValueError: The line is damaged.
    """
    checked = _CHECKED.fullmatch(line)
    if checked is None and needs_check:
        raise ValueError("it has no check value")
    if checked is not None and zlib.crc32(checked[1]) != int(checked[2], 16):
        raise ValueError("its check value differs")
    row = json.loads(line)
    if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
        raise ValueError("it is not the row of a step")
    row.pop("crc32", None)
    return row, checked is not None


def _read_lines(path: Path) -> Iterator[tuple[int, bytes, Row | ValueError]]:
    """Yield line number (from 1), line, and its row or the problem with it, without an incomplete last line."""
    if not path.is_file():
        return
    needs_check = False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row, is_checked = _parse_row(line, needs_check)
            except (ValueError, RecursionError) as error:
                yield number, line, ValueError(str(error))
                continue
            needs_check |= is_checked
            yield number, line, row


def iter_rows(path: Path, quiet: bool = False) -> Iterator[tuple[int, Row]]:
    """Read a file of rows line by line, also while a run is still writing it.

    Damaged lines are skipped with a warning. A last line without its newline (still being written, or cut short by a
    crash) is left out.

    Args:
        path: `metrics.jsonl` or `layers.jsonl`; a missing file has no rows.
        quiet: Do not warn.

    Yields:
        Line number (from 1) and row. Every row is a dict with an integer `step`.
    """
    for number, _, row in _read_lines(path):
        if not isinstance(row, ValueError):
            yield number, row
        elif not quiet:
            logger.warning("%s, line %d, is damaged and skipped (%s)", path, number, row)


def read_metrics(path: Path, quiet: bool = False) -> list[Row]:
    """Return all rows of a file, see `iter_rows`."""
    return [row for _, row in iter_rows(path, quiet)]


class MetricsWriter:
    """Writer of `metrics.jsonl` or `layers.jsonl`: each step once and in order, whenever the run was interrupted.

    Attributes:
        last: The newest row that was kept on opening; empty without any.
        seconds: Training time of the kept rows, in seconds.
    """

    def __init__(self, path: Path, after_step: int, is_writer: bool = True, loggers: Sequence[RowLogger] = ()):
        """Open the file for appending; damaged lines among the kept rows stay as they are.

        Args:
            path: The file; created if missing.
            after_step: The step of the checkpoint that training resumes from. Rows of later steps, written before the
                run was killed, are dropped: these steps are repeated.
            is_writer: Whether this process writes; the other processes only read.
            loggers: Further destinations of each row. One that raises is removed with a warning.
        """
        self._loggers = list(loggers)
        self._is_writer = is_writer
        lines: list[bytes] = []
        self.last: Row = {}
        for _, line, row in _read_lines(path):
            if not isinstance(row, ValueError):
                if row["step"] > after_step:
                    break
                self.last = row
            lines.append(line)
        self.seconds: float = self.last.get("seconds", 0.0)
        if is_writer:
            with replace_file(path) as partial:
                partial.write_bytes(b"".join(lines))
        # Line-buffered: other programs see complete rows.
        self._file: TextIO = open(path if is_writer else os.devnull, "a", encoding="utf-8", buffering=1)  # noqa: SIM115, PTH123

    def write(self, row: Row) -> None:
        """Append a row.

        Raises:
            ValueError: A value is NaN or infinite, which JSON cannot represent.
        """
        self._file.write(format_row(row))
        self._for_each_logger(lambda each: each.log(row))

    def flush(self) -> None:
        """Write the rows so far to disk, before a checkpoint that includes their steps is saved."""
        if self._is_writer:
            os.fsync(self._file.fileno())
        self._for_each_logger(lambda each: each.flush())

    def close(self) -> None:
        """Close the file and the loggers."""
        self._file.close()
        self._for_each_logger(lambda each: each.close())

    def _for_each_logger(self, call: Callable[[RowLogger], None]) -> None:
        for each in tuple(self._loggers):
            try:
                call(each)
            except Exception as error:  # a failing library or server must not stop training
                self._loggers.remove(each)
                logger.warning("%s failed and receives no more rows (%s)", type(each).__name__, error)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def progress_text(row: Row) -> str:
    """Return the loss, learning rate and speed of a row as text."""
    loss = "not finite, skipped" if row["loss"] is None else f"{row['loss']:.3f}"
    skipped = f", {row['skipped']} skipped" if row.get("skipped") else ""
    preferred = f", accuracy {row['accuracy']:.0%}, margin {row['margin']:.3f}" if "margin" in row else ""
    return (
        f"loss {loss}{preferred}{skipped}, lr {row['lr']:.2e}, {row['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {row['mfu']:.0%}, ETA {duration(row['eta_seconds'])}"
    )


def scores_text(row: Row) -> str:
    """Return the validation scores of a row as text."""
    if row["val_loss"] is None:
        return "no finite numbers"
    if "val_margin" in row:
        return (
            f"loss {row['val_loss']:.3f}, {row['val_accuracy']:.1%} of preferences, margin {row['val_margin']:.3f} "
            f"(rewards {row['val_chosen_reward']:.3f} and {row['val_rejected_reward']:.3f})"
        )
    return (
        f"loss {row['val_loss']:.3f}, perplexity {row['val_perplexity']:.1f}, "
        f"accuracy {row['val_accuracy']:.1%}, {row['val_bits_per_byte']:.3f} bits per byte{_sources_text(row)}"
    )


def source_scores(row: Row, score: str) -> dict[str, float]:
    """Return a validation score of each source of a mixture by name; empty for one source.

    Args:
        row: A row with validation scores, with keys such as `val_loss/NAME` for a mixture.
        score: `val_loss` or `val_bits_per_byte`.
    """
    prefix = f"{score}/"
    values = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def task_scores(row: Row) -> dict[str, float]:
    """Return the scores of `eval.tasks` in a row by task, without their intervals; empty if none was scored."""
    details = ("/low", "/high", "/chance")  # a label may have a slash
    names = [name for name in row if name.startswith("task_") and not name.endswith(details)]
    return {name.removeprefix("task_"): row[name] for name in names if isinstance(row[name], int | float)}


def tasks_text(row: Row) -> str:
    """Return the scores of the tasks of a row as text: `blimp 61.2 % (58.0 – 64.3)`."""
    parts = []
    for name, value in task_scores(row).items():
        low, high = row.get(f"task_{name}/low"), row.get(f"task_{name}/high")
        interval = "" if low is None or high is None else f" ({100 * low:.1f} – {100 * high:.1f})"
        parts.append(f"{name} {100 * value:.1f} %{interval}")
    return ", ".join(parts)


def _sources_text(row: Row) -> str:
    """Return the validation scores of the sources of a mixture as text: ` (python-docs 1.532, my 2.112)`."""
    scores = source_scores(row, "val_bits_per_byte")
    return f" ({', '.join(f'{name} {value:.3f}' for name, value in scores.items())})" if scores else ""
