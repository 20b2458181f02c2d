"""Saving and restoring: Orbax, asynchronous, committed atomically."""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from slm_jax.errors import UserError, is_disk_full


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def _quiet_orbax() -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates each save at INFO and WARNING


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save."""

    def __init__(self, folder: Path, keep: int):
        """folder is made if missing; the `keep` newest checkpoints stay."""
        _quiet_orbax()
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.wait()
            self._manager.close()
        else:  # an error is on its way: the save in flight is given its chance, but must not hide the cause
            with contextlib.suppress(Exception):
                self._manager.close()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Begin to save state (arrays are copied before this returns) and its position in the run.

        Raises UserError if an earlier save failed.
        """
        with _named_failures(self._folder):
            self._manager.check_for_errors()
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Until the save in flight is whole. Raises UserError if it failed."""
        with _named_failures(self._folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore_newest(self, target: Any, warn: Any = _to_stderr) -> tuple[Any, dict[str, Any]] | None:
        """(state, position) of the newest whole checkpoint, or None without any.

        target: the state's shapes, dtypes and shardings. A damaged checkpoint is named through warn, moved aside to
        `damaged/` beside the folder, and the one before it taken. Raises UserError if all are damaged.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(target), position=ocp.args.JsonRestore())
                restored = self._manager.restore(step, args=args)
                if restored.position["step"] != step:
                    raise ValueError(f"it says it is of step {restored.position['step']}")
                jax.block_until_ready(restored.state)
            except Exception as error:  # whatever a damaged file makes the reader raise
                damaged.append(step)
                warn(_damage(step, error))
                continue
            for bad in damaged:
                self._move_aside(bad)
            return restored.state, restored.position
        if damaged:
            raise UserError(
                f"no checkpoint in {self._folder} can be read (of steps {damaged}, see above): they are damaged, or of "
                "another version of this program. Restore one from a backup, or begin another --run"
            )
        return None

    def _move_aside(self, step: int) -> None:
        aside = self._folder.parent / "damaged" / str(step)
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        (self._folder / str(step)).rename(aside)
        self._manager.reload()


@contextlib.contextmanager
def _named_failures(folder: Path) -> Iterator[None]:
    """Turn a failed write into a UserError that says what is safe."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise UserError(
                f"no space left on the disk for a checkpoint in {folder}: free some and give the same command again; "
                "it continues from the last whole checkpoint"
            ) from None
        raise


def read_params(folder: Path, target: Any, warn: Any = _to_stderr) -> tuple[Any, int]:
    """(parameters, step) of the newest whole checkpoint of a run, without its optimizer. Raises UserError if none.

    target: the parameters' shapes, dtypes and shardings. A damaged checkpoint is named through warn and passed over.
    """
    found, step = read_newest(folder, {"params": target}, warn)
    return found["params"], step


def read_newest(folder: Path, item: dict[str, Any], warn: Any = _to_stderr) -> tuple[dict[str, Any], int]:
    """(some fields of the state, step) of the newest whole checkpoint; the folder is left as it is.

    item: for each field that is wanted its shapes, dtypes and shardings. Otherwise as `read_params`.
    """
    _quiet_orbax()
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    with contextlib.closing(ocp.CheckpointManager(folder.absolute(), options=options)) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                restore = ocp.args.PyTreeRestore(
                    item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
                )
                restored = manager.restore(step, args=ocp.args.Composite(state=restore))
                return jax.block_until_ready(dict(restored.state)), step
            except Exception as error:  # whatever a damaged file makes the reader raise
                warn(_damage(step, error))
    raise UserError(f"no usable checkpoint in {folder}")


def _damage(step: int, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0][:200]
    return f"checkpoint {step} is damaged and passed over ({type(error).__name__}: {reason})"
