"""The metrics of a run as columns, and their reduction to as few points as a screen can show."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.performance.flops import TokenFlops
from slm_jax.run.metrics import Row, iter_rows, task_scores
from slm_jax.utils.errors import UserError

FIELDS = (
    "step loss accuracy lr grad_norm tokens input_tokens mean_context bytes seconds tokens_per_second mfu time skipped "
    "loss_scale margin chosen_reward rejected_reward"
).split()
AXES = ("step", "tokens", "seconds", "flops")
_REQUIRED = ("step", "tokens", "seconds", "tokens_per_second", "mfu")
_SCORES = ("val_loss", "val_perplexity", "val_accuracy", "val_bits_per_byte")


@dataclass(frozen=True)
class Columns:
    """The N rows of a run's metrics, by column.

    Attributes:
        fields: float64 [N] by field name, NaN where a row has no value. `tokens` (predicted), `input_tokens` (read),
            `bytes` and `flops` are per step; `x` has their cumulative sums.
        validations: The rows with validation scores.
        offsets: Values of `AXES` at the end of the previous stages of a curriculum.
        tasks: The rows with scores of `eval.tasks`.
    """

    fields: dict[str, np.ndarray]
    validations: list[Row]
    offsets: dict[str, float]
    tasks: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.fields["step"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.fields[name]

    @property
    def x(self) -> dict[str, np.ndarray]:
        """Steps, predicted tokens, seconds and model FLOPs up to each row, [N] by `AXES`, including earlier stages."""
        values = {"step": self["step"], "seconds": self["seconds"]}
        values |= {axis: np.cumsum(np.nan_to_num(self[axis])) for axis in ("tokens", "flops")}
        return {axis: values[axis] + self.offsets[axis] for axis in AXES}

    @property
    def end(self) -> dict[str, float]:
        """The values of `x` at the last row, where the next stage starts."""
        return {axis: float(x[-1]) if len(x) else self.offsets[axis] for axis, x in self.x.items()}

    def with_offsets(self, offsets: dict[str, float]) -> "Columns":
        """Return the same rows as those of a stage that starts at `offsets`."""
        return replace(self, offsets=offsets)

    @property
    def bits_per_byte(self) -> np.ndarray:
        """The training loss in bits per byte of predicted text, [N], which is comparable between tokenizers."""
        with np.errstate(divide="ignore", invalid="ignore"):
            bits = self["loss"] * self["tokens"] / np.log(2) / self["bytes"]
        return np.where(self["bytes"] > 0, bits, np.nan)  # of pairs (DPO) there is none

    def validation_indices(self) -> np.ndarray:
        """Return the indices of the rows with validation scores, int [V]."""
        return self.indices(self.validations)

    def indices(self, rows: list[Row]) -> np.ndarray:
        """Return the indices of rows, int [R]."""
        return np.searchsorted(self["step"], [row["step"] for row in rows])


def read_columns(path: Path, token_flops: TokenFlops = TokenFlops(0.0, 0.0, 0.0)) -> Columns:
    """Read a metrics file; an incomplete last line is ignored.

    Args:
        path: `metrics.jsonl`; a missing file has no rows.
        token_flops: Model FLOPs of training on one token.

    Raises:
        UserError: The file is damaged.
    """
    rows: list[list[Any]] = []
    validations = []
    tasks = []
    for number, row in iter_rows(path):
        has_scores = row.get("val_loss") is not None
        for name in (*_REQUIRED, *_SCORES) if has_scores else _REQUIRED:
            if not isinstance(row.get(name), int | float):
                problem = f"line {number}: {name} is not a number"
                raise UserError(f"{path} is damaged ({problem}): restore it, or remove that line")
        rows.append([row.get(name) for name in FIELDS])
        if has_scores:
            validations.append(row)
        if task_scores(row):
            tasks.append(row)
    try:
        values = np.array(rows, np.float64).reshape(len(rows), len(FIELDS))  # None becomes NaN
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it") from None
    fields = {name: np.ascontiguousarray(column) for name, column in zip(FIELDS, values.T, strict=True)}
    # Runs of earlier versions have no input_tokens.
    inputs = fields["input_tokens"]
    fields["input_tokens"] = np.where(np.isnan(inputs), fields["tokens"], inputs)
    # Rows of full windows, and of earlier versions, have no mean_context.
    context = fields["mean_context"]
    context = np.where(np.isnan(context), token_flops.context, context)
    fields["flops"] = fields["input_tokens"] * token_flops.at(context)
    return Columns(fields, validations, dict.fromkeys(AXES, 0.0), tasks)


def concatenate_stages(stages: list[Columns]) -> Columns:
    """Concatenate the columns of stages, each with the offsets that `with_offsets` set."""
    fields = {name: np.concatenate([stage[name] for stage in stages]) for name in stages[0].fields}
    for axis in ("step", "seconds"):
        fields[axis] = np.concatenate([stage.x[axis] for stage in stages])
    validations = [row | {"step": row["step"] + stage.offsets["step"]} for stage in stages for row in stage.validations]
    tasks = [row | {"step": row["step"] + stage.offsets["step"]} for stage in stages for row in stage.tasks]
    return Columns(fields, validations, dict.fromkeys(AXES, 0.0), tasks)


def moving_average(y: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of the `width` values centered at each (fewer at the ends), ignoring NaN and infinity."""
    finite = np.isfinite(y)
    sums = np.cumsum(np.concatenate([[0.0], np.where(finite, y, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    index = np.arange(len(y))
    first = np.maximum(index - width // 2, 0)
    last = np.minimum(index + width // 2 + 1, len(y))
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def smoothing_width(num_rows: int) -> int:
    """Return the width of the moving average: a fiftieth of all rows, odd, at least 5."""
    return max(5, num_rows // 50 | 1)


def join_with_gaps(parts: list[np.ndarray], repeat: bool = False) -> np.ndarray:
    """Concatenate arrays with one value in between: NaN, or with `repeat` the last value of the previous array."""
    joined = [parts[0]]
    for part in parts[1:]:
        joined.append(joined[-1][-1:] if repeat else np.array([np.nan]))
        joined.append(part)
    return np.concatenate(joined)


class Buckets(NamedTuple):
    """A partition of N rows into B consecutive buckets of nearly equal size.

    Attributes:
        ends: Index after the last row of each bucket, int [B].
        num_rows: N.
    """

    ends: np.ndarray
    num_rows: int

    @classmethod
    def partition(cls, num_rows: int, max_buckets: int) -> "Buckets":
        """Partition rows into `max_buckets` buckets, or one per row if there are fewer rows."""
        count = min(num_rows, max_buckets)
        return cls((np.arange(1, count + 1) * num_rows) // max(count, 1), num_rows)

    @property
    def is_identity(self) -> bool:
        """True if each row has its own bucket."""
        return len(self.ends) == self.num_rows

    def last(self, values: np.ndarray) -> np.ndarray:
        """Return the last value of each bucket, [B]."""
        return values[self.ends - 1]

    def mean_min_max(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return mean, minimum and maximum of the finite values of each bucket, [B]; NaN for a bucket without one."""
        if self.num_rows == 0:
            return y, y, y
        starts = np.concatenate([[0], self.ends[:-1]])
        finite = np.isfinite(y)
        counts = np.add.reduceat(finite.astype(np.int64), starts)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.add.reduceat(np.where(finite, y, 0.0), starts) / counts
        low = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
        high = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
        return mean, np.where(counts > 0, low, np.nan), np.where(counts > 0, high, np.nan)
