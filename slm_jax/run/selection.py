"""Choose a checkpoint of a run: the best, the last, or that of a given step.

The best checkpoint is the one with the fewest validation bits per byte among those that are kept
(`checkpoint.keep_best`). Without a choice it is used where the validation does not improve any more: if the newest
validation is the best one, the last checkpoint is used.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slm_jax.config.schema import CheckpointConfig
from slm_jax.run.checkpoint import open_folder, read_position, steps_in
from slm_jax.run.directory import Run
from slm_jax.run.metrics import iter_rows
from slm_jax.run.trend import Trend
from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

Step = int | str | None
"""A choice: "best", "last", the number of a step, or None (or an empty string) for the default."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint of a run.

    Attributes:
        step: The number of steps taken.
        loss: Validation loss in nats per token, None if the step was not validated.
        bits_per_byte: Validation bits per byte, None if the step was not validated.
        is_best: Whether it has the fewest bits per byte of all that are kept.
        is_last: Whether it is the newest one.
    """

    step: int
    loss: float | None
    bits_per_byte: float | None
    is_best: bool
    is_last: bool


@dataclass(frozen=True)
class Selection:
    """The checkpoints that a choice stands for.

    Attributes:
        candidates: Steps in the order in which they are tried: the next is used where one is corrupt.
        best: The step of the best checkpoint, None if none was validated.
        last: The step of the newest checkpoint.
    """

    candidates: tuple[int, ...]
    best: int | None
    last: int

    @property
    def step(self) -> int:
        """The step that is used unless its checkpoint is corrupt."""
        return self.candidates[0]

    def describe(self, step: int) -> str:
        """Return what a step is among the checkpoints: "step 125 (best; last is 300)"."""
        names = [name for name, each in (("best", self.best), ("last", self.last)) if each == step]
        others = [("best", self.best), ("last", self.last)]
        rest = [f"{name} is {each}" for name, each in others if each is not None and each != step]
        return f"step {step} ({'; '.join(filter(None, [' and '.join(names), ', '.join(rest)]))})"


def list_checkpoints(run: Run) -> list[SavedCheckpoint]:
    """Return the complete checkpoints of a run in ascending order, also while it is training.

    The scores are those that each checkpoint holds. Files are not verified, so that this takes milliseconds.

    Args:
        run: The run; it may have none.

    Raises:
        UserError: The folder of the checkpoints cannot be read.
    """
    folder = open_folder(run.checkpoints)
    positions = {step: _read_position(folder, step) for step in _steps(folder)}
    return _listed(positions, _logged_losses(run, positions))


def _steps(folder: Any) -> list[int]:
    try:
        return steps_in(folder)
    except Exception as error:  # no permission; a bucket's library raises errors of its own
        raise UserError(f"the folder of checkpoints {folder} cannot be read ({error})") from None


def _read_position(folder: Any, step: int) -> dict[str, Any]:
    """Return the JSON values of a checkpoint; none if they cannot be read (corrupt, or deleted meanwhile)."""
    try:
        return read_position(folder, step)
    except Exception:  # a bucket's library raises errors of its own
        return {}


def _score(position: dict[str, Any]) -> float | None:
    score = position.get("score")
    return score if isinstance(score, float) and math.isfinite(score) else None


def _trend(position: dict[str, Any]) -> Trend | None:
    """Return the trend that a checkpoint stores; None for those of earlier versions."""
    try:
        return Trend.from_json(position["validation"])
    except (KeyError, TypeError):
        return None


def _logged_losses(run: Run, positions: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Return validation losses of `metrics.jsonl` by step, where a checkpoint has a score but no loss."""
    if all(_score(position) is None or _trend(position) for position in positions.values()):
        return {}
    rows = (row for _, row in iter_rows(run.metrics, quiet=True))
    return {row["step"]: row["val_loss"] for row in rows if row.get("val_loss") is not None}


def _listed(positions: dict[int, dict[str, Any]], losses: dict[int, float]) -> list[SavedCheckpoint]:
    scores = {step: _score(position) for step, position in positions.items()}
    measured = [(score, step) for step, score in scores.items() if score is not None]
    best = min(measured)[1] if measured else None
    saved = []
    for step in sorted(positions):
        trend = _trend(positions[step])
        newest = trend.newest if trend else None
        loss = newest.loss if newest and newest.step == step else losses.get(step)
        is_validated = scores[step] is not None
        saved.append(
            SavedCheckpoint(
                step=step,
                loss=loss if is_validated else None,
                bits_per_byte=scores[step],
                is_best=step == best,
                is_last=step == max(positions),
            )
        )
    return saved


def parse_step(value: Step) -> int | str:
    """Return a choice as "best", "last", a number, or "" for the default.

    Raises:
        UserError: It is none of these.
    """
    if value is None or value in ("", "best", "last"):
        return value or ""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise UserError(f"--step {value!r}: should be best, last, or the number of a step")


def select_checkpoint(run: Run, step: Step = None) -> Selection:
    """Choose a checkpoint of a run.

    Args:
        run: The run.
        step: "best", "last" or the number of a step. None: the best checkpoint if the newest validation is not the best
            one, otherwise the last checkpoint.

    Raises:
        UserError: There is no such checkpoint; those that exist are listed.
    """
    choice = parse_step(step)
    folder = open_folder(run.checkpoints)
    positions = {each: _read_position(folder, each) for each in _steps(folder)}
    if not positions:
        raise UserError(f"{run.path} has no checkpoint")
    saved = _listed(positions, {})
    newest_first = [each.step for each in reversed(saved)]
    best = next((each.step for each in saved if each.is_best), None)
    last = newest_first[0]
    if isinstance(choice, int):
        if choice not in positions:
            raise UserError(f"{run.path} has no checkpoint of step {choice}; it has {_steps_text(saved)}")
        return Selection((choice,), best, last)
    if choice == "best":
        if best is None:
            logger.warning("no checkpoint of %s was validated: the last one is used instead of the best", run.path)
            return Selection(tuple(newest_first), None, last)
        measured = sorted((each.bits_per_byte, each.step) for each in saved if each.bits_per_byte is not None)
        return Selection(tuple(each for _, each in measured), best, last)
    if choice == "" and best is not None and _trend_up_to(run, positions[last], last).since_best:
        return Selection((best, *(each for each in newest_first if each != best)), best, last)
    return Selection(tuple(newest_first), best, last)


def regular_steps(newest_first: Sequence[int], config: CheckpointConfig) -> list[int]:
    """Return the steps that stay without regard to their scores: the newest `keep`, and every `keep_every` steps.

    Args:
        newest_first: The steps of all checkpoints.
        config: The options of the checkpoints.
    """
    every = config.keep_every
    return [step for i, step in enumerate(newest_first) if i < config.keep or (every and step and step % every == 0)]


def newest_trend(run: Run) -> Trend:
    """Return the validations of a run up to its newest checkpoint; none without a checkpoint.

    Raises:
        UserError: The folder of the checkpoints cannot be read.
    """
    step = run.newest_step()
    return Trend() if step is None else _trend_up_to(run, newest_position(run), step)


def newest_position(run: Run) -> dict[str, Any]:
    """Return the JSON values that the newest checkpoint of a run stores; none without one, or if it is corrupt.

    Raises:
        UserError: The folder of the checkpoints cannot be read.
    """
    folder = open_folder(run.checkpoints)
    steps = _steps(folder)
    return _read_position(folder, steps[-1]) if steps else {}


def _trend_up_to(run: Run, position: dict[str, Any], step: int) -> Trend:
    """Return the trend that a checkpoint stores; of earlier versions, that of the rows of `metrics.jsonl`."""
    trend = _trend(position)
    if trend is None:
        rows = (row for _, row in iter_rows(run.metrics, quiet=True))
        trend = Trend.from_rows(row for row in rows if row["step"] <= step)
    return trend


def _steps_text(saved: Sequence[SavedCheckpoint]) -> str:
    """Return the steps of checkpoints as text: "125 (best), 200, 300 (last)"."""
    texts = []
    for each in saved:
        names = [name for name, applies in (("best", each.is_best), ("last", each.is_last)) if applies]
        texts.append(f"{each.step} ({', '.join(names)})" if names else str(each.step))
    return ", ".join(texts)
