"""The rows of a run as columns, and as few points of them as a screen can show."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.run.metrics import Row, damaged_line, iter_rows
from slm_jax.utils.errors import UserError

FIELDS = "step loss accuracy lr grad_norm tokens input_tokens bytes seconds tokens_per_second mfu time skipped".split()
AXES = ("step", "tokens", "seconds", "flops")
NEEDED = ("step", "tokens", "seconds", "tokens_per_second", "mfu")
SCORES = ("val_loss", "val_perplexity", "val_accuracy", "val_bits_per_byte")


@dataclass(frozen=True)
class Columns:
    """The N rows of a run: float64 [N] by field (NaN where a row has none), and the rows with validation scores.

    `tokens` (predicted), `input_tokens` (read), `bytes` and `flops` are of each step; `x` has what was seen so far. The
    offsets are those of the stages before.
    """

    fields: dict[str, np.ndarray]
    validations: list[Row]
    offsets: dict[str, float]

    def __len__(self) -> int:
        return len(self.fields["step"])

    def __getitem__(self, field: str) -> np.ndarray:
        return self.fields[field]

    @property
    def x(self) -> dict[str, np.ndarray]:
        """By `AXES`, [N]: steps, tokens predicted, seconds and model FLOPs so far, the stages before included."""
        found = {"step": self["step"], "seconds": self["seconds"]}
        found |= {axis: np.cumsum(np.nan_to_num(self[axis])) for axis in ("tokens", "flops")}
        return {axis: found[axis] + self.offsets[axis] for axis in AXES}

    @property
    def end(self) -> dict[str, float]:
        """Where the axes end; the next stage begins there."""
        return {axis: float(x[-1]) if len(x) else self.offsets[axis] for axis, x in self.x.items()}

    def after(self, end: dict[str, float]) -> "Columns":
        """The same rows, as those of a stage that begins at `end`."""
        return replace(self, offsets=end)

    @property
    def bits_per_byte(self) -> np.ndarray:
        """The training loss of each step in bits per byte of the text it predicts: as such comparable between
        tokenizers."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self["loss"] * self["tokens"] / np.log(2) / self["bytes"]

    def validated_at(self) -> np.ndarray:
        """int [V]: the rows that hold validation scores."""
        return np.searchsorted(self["step"], [row["step"] for row in self.validations])


def read_columns(path: Path, flops_per_token: float = 0.0) -> Columns:
    """The rows of a metrics file, read a line at a time; a last line that is cut short is left out.

    flops_per_token: model FLOPs of training on a token. Raises UserError on other damage.
    """
    rows: list[list[Any]] = []
    validations = []
    for number, row in iter_rows(path):
        is_validated = row.get("val_loss") is not None
        for field in (*NEEDED, *SCORES) if is_validated else NEEDED:
            if not isinstance(row.get(field), int | float):
                raise damaged_line(path, number, f"{field} is not a number")
        rows.append([row.get(field) for field in FIELDS])
        if is_validated:
            validations.append(row)
    try:
        values = np.array(rows, np.float64).reshape(len(rows), len(FIELDS))  # None becomes NaN
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it") from None
    fields = {field: np.ascontiguousarray(column) for field, column in zip(FIELDS, values.T, strict=True)}
    inputs = fields["input_tokens"]
    fields["input_tokens"] = np.where(np.isnan(inputs), fields["tokens"], inputs)  # versions before had none
    fields["flops"] = fields["input_tokens"] * flops_per_token
    return Columns(fields, validations, dict.fromkeys(AXES, 0.0))


def joined(parts: list[Columns]) -> Columns:
    """Stages one behind another, each with the offsets that `after` gave it."""
    fields = {field: np.concatenate([part[field] for part in parts]) for field in parts[0].fields}
    for axis in ("step", "seconds"):
        fields[axis] = np.concatenate([part.x[axis] for part in parts])
    validations = [row | {"step": row["step"] + part.offsets["step"]} for part in parts for row in part.validations]
    return Columns(fields, validations, dict.fromkeys(AXES, 0.0))


def smoothed(y: np.ndarray, width: int) -> np.ndarray:
    """The mean of the `width` values around each (fewer at the ends); values that are no numbers are passed over."""
    known = np.isfinite(y)
    sums = np.cumsum(np.concatenate([[0.0], np.where(known, y, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], known]))
    place = np.arange(len(y))
    first, last = np.maximum(place - width // 2, 0), np.minimum(place + width // 2 + 1, len(y))
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def smoothing_width(rows: int) -> int:
    """Rows that a smoothed value is the mean of: a fiftieth of all, an odd number, at least 5."""
    return max(5, rows // 50 | 1)


def with_gaps(parts: list[np.ndarray], repeat: bool = False) -> np.ndarray:
    """Stretches one behind another with a value between that is no number (repeat: or the last of the one before)."""
    found = [parts[0]]
    for part in parts[1:]:
        found += [found[-1][-1:] if repeat else np.array([np.nan]), part]
    return np.concatenate(found)


class Buckets(NamedTuple):
    """Equal stretches of N rows, B of them: which row each ends behind."""

    ends: np.ndarray  # int [B]
    rows: int

    @classmethod
    def of(cls, rows: int, most: int) -> "Buckets":
        """At most so many stretches; one for each row where there are no more rows than that."""
        count = min(rows, most)
        return cls((np.arange(1, count + 1) * rows) // max(count, 1), rows)

    @property
    def whole(self) -> bool:
        """Each row is a bucket."""
        return len(self.ends) == self.rows

    def last(self, values: np.ndarray) -> np.ndarray:
        """[B] of [N]: the last of each stretch."""
        return values[self.ends - 1]

    def reduced(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(mean, least, greatest) of each stretch, [B] each; NaN where a stretch has no number."""
        if self.rows == 0:
            return y, y, y
        starts = np.concatenate([[0], self.ends[:-1]])
        known = np.isfinite(y)
        counts = np.add.reduceat(known.astype(np.int64), starts)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.add.reduceat(np.where(known, y, 0.0), starts) / counts
        least = np.minimum.reduceat(np.where(known, y, np.inf), starts)
        greatest = np.maximum.reduceat(np.where(known, y, -np.inf), starts)
        return mean, np.where(counts > 0, least, np.nan), np.where(counts > 0, greatest, np.nan)
