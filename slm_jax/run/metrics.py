"""What a run says of itself: JSON lines, a progress bar, the loss plot."""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from slm_jax.utils.errors import UserError
from slm_jax.utils.files import replace_file, replace_text
from slm_jax.utils.formatting import duration

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file; a last line cut short by a crash is left out. Raises UserError on other damage."""
    if not path.is_file():
        return []
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")  # behind the last line end: nothing, or a torn row
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or remove the lines that are no JSON") from None
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            raise UserError(f"{path} is damaged (line {number} is no row of a step): restore it, or remove that line")
    return rows


class MetricsFile:
    """`metrics.jsonl`: one row per step, in order, each step once whatever happened."""

    def __init__(self, path: Path, after_step: int, writes: bool = True, sinks: Sequence[Any] = ()):
        """Opens for appending after step `after_step`; rows of later steps (of a run that was killed) are dropped.

        writes: whether this process is the one that does; the others read. sinks: what else gets each row (sinks.py);
        one that fails is left out from then on, and named.
        """
        self._sinks, self._writes = list(sinks), writes
        kept = [row for row in read_rows(path) if row["step"] <= after_step]
        self.last: Row = kept[-1] if kept else {}
        self.seconds: float = kept[-1].get("seconds", 0.0) if kept else 0.0  # training time of the kept rows
        if writes:
            replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        where = path if writes else os.devnull
        self._file: TextIO = open(where, "a", encoding="utf-8", buffering=1)  # noqa: SIM115, PTH123  # a line at a time

    def write(self, row: Row) -> None:
        """Append a row."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._tell(lambda sink: sink.log(row))

    def flush(self) -> None:
        """What the rows so far are to survive comes now."""
        if self._writes:
            os.fsync(self._file.fileno())
        self._tell(lambda sink: sink.flush())

    def close(self) -> None:
        """Close the file and the sinks."""
        self._file.close()
        self._tell(lambda sink: sink.close())

    def _tell(self, call: Callable[[Any], None]) -> None:
        for sink in tuple(self._sinks):
            try:
                call(sink)
            except Exception as error:  # of a library or a server: no reason to stop
                self._sinks.remove(sink)
                print(f"note: {type(sink).__name__} takes no more rows ({error})", file=sys.stderr)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Progress:
    """A bar on a terminal, else a plain line every so many steps; both go to stderr."""

    def __init__(self, steps: int, done: int, every: int, stream: TextIO | None = None):
        """steps in all, those done before a resume, and steps between plain lines."""
        self._stream = stream or sys.stderr
        self._every, self._steps = every, steps
        self._bar = None
        if self._stream.isatty():
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=steps, initial=done, bar_format=form, file=self._stream, dynamic_ncols=True)

    def show(self, row: Row) -> None:
        """The newest step."""
        loss = "not finite, skipped" if row["loss"] is None else f"{row['loss']:.3f}"
        skipped = f", {row['skipped']} skipped" if row.get("skipped") else ""
        text = (
            f"loss {loss}{skipped}, lr {row['lr']:.2e}, {row['tokens_per_second']:,.0f} tokens/s, "
            f"MFU {row['mfu']:.0%}, ETA {duration(row['eta_seconds'])}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(row["step"] - self._bar.n)
        elif row["step"] % self._every == 0 or row["step"] == self._steps:
            print(f"step {row['step']}/{self._steps}  {text}", file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def scores_text(row: Row) -> str:
    """The validation scores of a row in words."""
    if row["val_loss"] is None:
        return "no finite numbers"
    return (
        f"loss {row['val_loss']:.3f}, perplexity {row['val_perplexity']:.1f}, "
        f"accuracy {row['val_accuracy']:.1%}, {row['val_bits_per_byte']:.3f} bits per byte"
    )


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Training and validation loss, and the learning rate, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = [row["step"] for row in rows]
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]  # None: skipped
    loss.plot(steps, losses, linewidth=0.8, label="training")
    validated = [row for row in rows if row.get("val_loss") is not None]
    if validated:
        label = f"validation (last: {validated[-1]['val_bits_per_byte']:.3f} bits per byte)"
        loss.plot([r["step"] for r in validated], [r["val_loss"] for r in validated], marker="o", label=label)
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    loss.grid(alpha=0.3)
    loss.set_title(title.encode(errors="replace").decode().replace("$", r"\$"))
    rate.plot(steps, [row["lr"] for row in rows], color="tab:gray")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """A Matplotlib figure as a PNG that is there whole or not at all."""
    with replace_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
