"""The outcome of training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """The outcome of a call of `train`.

    Attributes:
        run: The run directory.
        step: The number of steps taken, those of earlier calls included.
        metrics: The last row of `metrics.jsonl`.
        stopped_by: The signal that ended training before its last step.
        signal: The signal that was received, also during the last step.
    """

    run: Path
    step: int
    metrics: dict[str, Any]
    stopped_by: int | None = None
    signal: int | None = None
