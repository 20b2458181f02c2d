"""The course of the validation of a run: the newest one, the best one, and how many came since.

    trend = Trend()
    trend = trend.add(step=250, loss=3.8, bits_per_byte=1.6)    after each validation
    trend.has_risen, trend.is_over(patience=3)

The best validation is the one with the fewest bits per byte, the earlier one of two that are equal. A trend is stored
with each checkpoint, so that a resumed run continues it exactly, whatever became of `metrics.jsonl`.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TOLERANCE = 0.01  # a validation this far above the best one is a rise; the noise of validations is smaller


@dataclass(frozen=True)
class Validation:
    """One validation; its numbers are None where they were not finite.

    Attributes:
        step: The step after which it was measured.
        loss: Nats per token.
        bits_per_byte: Bits per byte; of a DPO run its loss, in nats per pair.
    """

    step: int
    loss: float | None
    bits_per_byte: float | None


@dataclass(frozen=True)
class Trend:
    """The validations of a run up to a step.

    Attributes:
        newest: The newest one, None before the first.
        best: The one with the fewest bits per byte, None before one whose numbers are finite.
        since_best: Number of validations after the best one.
    """

    newest: Validation | None = None
    best: Validation | None = None
    since_best: int = 0

    def add(self, step: int, loss: float | None, bits_per_byte: float | None) -> "Trend":
        """Return the trend with one more validation."""
        newest = Validation(step, _finite(loss), _finite(bits_per_byte))
        lowest = math.inf if self.best is None or self.best.bits_per_byte is None else self.best.bits_per_byte
        if newest.bits_per_byte is not None and newest.bits_per_byte < lowest:
            return Trend(newest, newest, 0)
        return Trend(newest, self.best, self.since_best + 1)

    @property
    def has_risen(self) -> bool:
        """True if the newest validation is more than 1 % above the best one, or not finite."""
        if self.best is None or self.newest is None:
            return False
        newest, best = self.newest.bits_per_byte, self.best.bits_per_byte
        return newest is None or best is None or newest > (1 + TOLERANCE) * best

    def is_over(self, patience: int) -> bool:
        """Return whether the last `patience` validations did not improve on the best one; 0: never."""
        return 0 < patience <= self.since_best

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values that a checkpoint stores."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Trend":
        """Return the trend that `to_json` was called on."""
        newest, best = (Validation(**each) if each else None for each in (values["newest"], values["best"]))
        return cls(newest, best, values["since_best"])

    @classmethod
    def from_rows(cls, rows: Iterable[dict[str, Any]]) -> "Trend":
        """Return the trend of the rows of `metrics.jsonl`: for checkpoints of versions that stored none."""
        trend = cls()
        for row in rows:
            if "val_bits_per_byte" in row:
                trend = trend.add(row["step"], row.get("val_loss"), row["val_bits_per_byte"])
        return trend


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
