"""Restore the newest valid checkpoint of a run, and report those that are not."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from etils import epath

from slm_jax.distributed import agreement, multihost
from slm_jax.run.checkpoint import Checkpoints, read_position, steps_in, verify_checkpoint
from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)


def restore_newest(
    checkpoints: Checkpoints, target: Callable[[dict[str, Any]], Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Restore the newest valid checkpoint.

    Corrupt checkpoints are logged, skipped, and moved to `damaged/` in the folder (in a bucket they lose the mark
    of a complete checkpoint).

    Args:
        checkpoints: The checkpoints of a run.
        target: Returns, for a checkpoint's position, the shapes, dtypes and shardings of its state. What it raises
            is raised.

    Returns:
        State and position, or None without any checkpoint.

    Raises:
        UserError: All checkpoints are corrupt, or a valid one does not have the target's arrays.
    """
    folder = checkpoints.folder
    damaged: list[int] = []
    for step in newest_first(folder):
        checked = agreement.attempt(f"verification of checkpoint {step}", partial(_verify, folder, step))
        if checked.errors:
            damaged.append(step)
            warn_of_damage(step, checked)
            continue
        first: Any = agreement.from_first(f"position of checkpoint {step}", partial(getattr, checked, "value"))
        is_verified, position = first
        restored = agreement.attempt(
            f"restoring checkpoint {step}", partial(checkpoints.restore, step, target(position))
        )
        if restored.errors:
            raise_mismatch(folder / str(step), restored, is_verified)
            damaged.append(step)
            warn_of_damage(step, restored)
            continue
        for each in damaged:
            checkpoints.move_aside(each)
        return restored.value, position
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} can be read (of steps {damaged}, see above): restore one from a "
            "backup, or start another --run"
        )
    return None


def _verify(folder: epath.Path, step: int) -> tuple[bool, dict[str, Any]]:
    """Verify this process's part of a checkpoint; return whether it has checksums, and its position."""
    return verify_checkpoint(folder, step, multihost.part()), read_position(folder, step)


def newest_first(folder: epath.Path) -> list[int]:
    """Return the steps of the checkpoints in a folder as the first process sees them, newest first."""
    return agreement.from_first("checkpoints", lambda: steps_in(folder))[::-1]


def raise_mismatch(path: epath.Path, outcome: agreement.Outcome[Any], is_verified: bool) -> None:
    """Raise the error for a valid checkpoint that no process can restore.

    One that some processes have restored fits the config: the others could not read it. The first version wrote no
    checksums, so that it cannot be known whether such a checkpoint is corrupt or does not fit.
    """
    if is_verified and outcome.error is not None and len(outcome.errors) == multihost.process_count():
        raise mismatch_error(path, outcome.error) from outcome.error


def mismatch_error(path: epath.Path, error: Exception) -> Exception:
    """Return the error for a valid checkpoint that cannot be restored."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return error
    return UserError(
        f"the checkpoint {path} is complete, but its arrays do not match this config: it was saved with another one, "
        f"or by another version of this program ({agreement.summary(error)})"
    )


def warn_of_damage(step: int, outcome: agreement.Outcome[Any], path: epath.Path | None = None) -> None:
    """Warn of a checkpoint that cannot be read: each process of its own error, the first one of all.

    Args:
        step: The step of the checkpoint.
        outcome: What failed.
        path: The checkpoint, if it may be missing because a training process has just deleted it.
    """
    if path is not None and not path.exists():
        return
    if outcome.error is not None:
        logger.warning("checkpoint %d is corrupt and skipped (%s)", step, agreement.summary(outcome.error))
    if multihost.is_first():
        for process in outcome.errors.keys() - {0}:
            logger.warning(
                "checkpoint %d is skipped: process %d cannot read it (%s)", step, process, outcome.errors[process]
            )
