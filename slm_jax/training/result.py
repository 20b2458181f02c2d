"""The outcome of training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm_jax.run.trend import Trend


@dataclass(frozen=True)
class Result:
    """The outcome of a call of `train`.

    Attributes:
        run: The run directory.
        step: The number of steps taken, those of earlier calls included.
        metrics: The last row of `metrics.jsonl`.
        stopped_by: The signal that ended training before its last step.
        signal: The signal that was received, also during the last step.
        trend: The newest validation and the best one.
    """

    run: Path
    step: int
    metrics: dict[str, Any]
    stopped_by: int | None = None
    signal: int | None = None
    trend: Trend = field(default_factory=Trend)
