"""Save checkpoints, and restore one: asynchronous (Orbax), committed atomically, every byte verified when it is read.

A checkpoint is a folder named after its step. It appears under that name only when it is complete:

    100/state/          parameters, optimizer state, step, random key (Orbax)
        position/       JSON: step, validation score, and what the checkpoint is compatible with
        checksums.json  size and CRC-32 of every file (Orbax and TensorStore do not verify the bytes of arrays)
"""

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from slm_jax.config.schema import CheckpointConfig
from slm_jax.distributed import agreement, multihost
from slm_jax.run import checksums
from slm_jax.run.quiet import quiet_orbax
from slm_jax.utils.errors import UserError, disk_problem
from slm_jax.utils.extras import install_command

logger = logging.getLogger(__name__)

_COMMITTED = "commit_success.txt"  # in a bucket, where a rename is not atomic, this file marks a complete checkpoint
_DELETED = ".deleted-"


def open_folder(folder: str | Path | epath.Path) -> epath.Path:
    """Return the path of a folder on this machine or in a bucket (gs://), which may not exist yet.

    Raises:
        UserError: The folder cannot be read, or the library that reads buckets is missing.
    """
    text = str(folder)
    try:
        path = epath.Path(text if "://" in text else Path(text).absolute())
        path.exists()
    except ImportError as error:
        raise UserError(f"{text} needs a library that reads buckets: {install_command('gcs')} ({error})") from None
    except Exception as error:  # a bucket's library raises errors of its own
        raise UserError(f"the folder of checkpoints {text} cannot be read ({agreement.summary(error)})") from None
    return path


def steps_in(folder: epath.Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, in ascending order."""
    return sorted(int(p.name) for p in _list(folder) if p.name.isdigit() and _is_committed(p))


def _list(folder: epath.Path) -> list[epath.Path]:
    # Not by exists(), which also returns False if a bucket does not answer.
    try:
        return list(folder.iterdir())
    except FileNotFoundError:  # a bucket has no empty folders
        return []


def _is_committed(path: epath.Path) -> bool:
    """Return whether a folder that is named after a step is a complete checkpoint."""
    return not checksums.is_remote(path) or any(file.name == _COMMITTED for file in _list(path))


def read_position(folder: epath.Path, step: int) -> dict[str, Any]:
    """Return the JSON values of a checkpoint, which are not verified.

    Raises:
        OSError: They cannot be read; a bucket's library raises errors of its own.
        ValueError: They are damaged.
    """
    position = json.loads((folder / str(step) / "position" / "metadata").read_text())
    if not isinstance(position, dict) or position.get("step") != step:
        raise checksums.DamagedError("its position is of another step")
    return position


def verify_checkpoint(folder: epath.Path, step: int, part: tuple[int, int] = (0, 1)) -> bool:
    """Verify the files of a checkpoint, see `checksums.verify`.

    Args:
        folder: The folder of the checkpoints.
        step: The step.
        part: (index, count): the part of the files whose checksums are compared.

    Returns:
        True if they are what was written; False for a checkpoint of the first version, which wrote no checksums.

    Raises:
        DamagedError: A file is missing or differs from its checksum.
        OSError: A file cannot be read; a bucket's library raises errors of its own.
    """
    if checksums.verify(folder / str(step), part):
        return True
    if "score" in read_position(folder, step):  # the versions that store it write checksums, too
        raise checksums.DamagedError("its checksums.json is missing")
    return False


@dataclass(frozen=True)
class _WhenWritten:
    """The last of the futures of a save, which Orbax waits for in order."""

    run: Callable[[], None]

    def result(self, timeout: float | None = None) -> None:
        """Do the work."""
        self.run()

    def cancel(self) -> None:
        """Do nothing: the work is not started before its turn."""


class _Handler(ocp.CompositeCheckpointHandler):
    """Handler of the items of a checkpoint, which writes its checksums before it is committed."""

    def __init__(self) -> None:
        super().__init__(state=ocp.StandardCheckpointHandler(), position=ocp.JsonCheckpointHandler())

    async def async_save(self, directory: epath.Path, args: Any) -> list[Any]:
        """Start to save; with several processes each adds the checksums of its own files when these are written."""
        futures = list(await super().async_save(directory, args) or [])
        if multihost.process_count() > 1:
            arrays = self._current_temporary_paths["state"].get()
            futures.append(_WhenWritten(partial(checksums.write_part, directory, arrays, multihost.process_index())))
        return futures

    def finalize(self, directory: epath.Path) -> None:
        """Write the checksums: Orbax calls this on one process, in its thread, when all files are written."""
        super().finalize(directory)
        checksums.write(directory)


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """Arguments of a _Handler."""


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save when it is left.

    All processes of a run use it together; the first one deletes.
    """

    def __init__(self, folder: Path | epath.Path, config: CheckpointConfig):
        """Open a folder of checkpoints and remove what interrupted saves and deletions left in it.

        Args:
            folder: The folder; created if missing.
            config: When to save, and which checkpoints to keep.

        Raises:
            UserError: The folder cannot be read.
        """
        self._folder = open_folder(folder)
        self._config = config
        self._folder.mkdir(parents=True, exist_ok=True)
        self._is_first = multihost.is_first()
        if self._is_first:
            self._clean()
        self._handler = _Handler()
        self._writer = ocp.AsyncCheckpointer(self._handler)
        scores = agreement.from_first("scores of the checkpoints", self._read_scores)
        self._scores: dict[int, float | None] = {int(step): score for step, score in scores.items()}
        self._saved_at = time.monotonic()
        self._finishing: threading.Thread | None = None
        self._error: BaseException | None = None
        self._quiet = contextlib.ExitStack()

    def __enter__(self) -> "Checkpoints":
        self._quiet.enter_context(quiet_orbax())
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._quiet:
            if kind is None:
                self.wait()
                self._writer.close()
            elif kind is not KeyboardInterrupt:  # let a save finish, but do not hide the original error
                with contextlib.suppress(Exception):
                    self.wait()
                with contextlib.suppress(Exception):
                    self._writer.close()

    @property
    def folder(self) -> epath.Path:
        """The folder of the checkpoints."""
        return self._folder

    def due(self, step: int, score: float | None = None) -> bool:
        """Return whether a checkpoint of a step is to be saved. Called after every step.

        Args:
            step: The step that was taken.
            score: Validation bits per byte of that step, if it was measured.

        Raises:
            UserError: The save in progress has failed.
        """
        self.check()
        config = self._config
        if step % config.every == 0 or (config.keep_every and step % config.keep_every == 0):
            return True
        if config.minutes and self._agreed(step, time.monotonic() - self._saved_at >= 60 * config.minutes):
            return True
        # The scores are those of the first process in all.
        return score is not None and step in self._best(self._scores | {step: score})

    def save(self, step: int, state: Any, position: dict[str, Any], score: float | None = None) -> None:
        """Start to save a checkpoint; arrays are copied before this returns.

        Args:
            step: The number of steps taken.
            state: A tree of arrays.
            position: JSON values to store with it, which `run.restore` passes to its `target`.
            score: Validation bits per byte, if it was measured.

        Raises:
            UserError: An earlier save has failed.
        """
        self.wait()
        self._scores[step] = score
        position = position | {"step": step, "score": score}
        args = _Items(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        with _write_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)  # Orbax's threads would wait ten minutes for it
            self._writer.save(self._folder / str(step), args=args, force=True)
        self._saved_at = time.monotonic()
        self._finishing = threading.Thread(target=self._finish, name="checkpoint", daemon=True)
        self._finishing.start()

    def _finish(self) -> None:
        """Wait until the save in progress is committed, then delete the checkpoints that it replaces."""
        try:
            self._writer.wait_until_finished()
            if self._is_first:
                steps = steps_in(self._folder)
                for step in set(steps) - self._kept(steps):
                    self._delete(step)
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raise the error of the save in progress, if it has failed: a UserError where the user can fix it."""
        if self._error is not None:
            error = self._error
            self._error = None
            with _write_errors(self._folder):
                raise error

    def wait(self) -> None:
        """Wait until the save in progress is complete and the checkpoints that it replaces are deleted.

        Raises:
            UserError: It has failed.
        """
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        self.check()

    def _kept(self, steps: list[int]) -> set[int]:
        """Return the steps, among all that are saved, whose checkpoints stay."""
        config = self._config
        kept = {*steps[-config.keep :], *self._best({s: self._scores.get(s) for s in steps})}
        return kept | {step for step in steps if step and config.keep_every and step % config.keep_every == 0}

    def _best(self, scores: dict[int, float | None]) -> list[int]:
        """Return the `keep_best` steps with the lowest scores."""
        measured = sorted((s, step) for step, s in scores.items() if s is not None and math.isfinite(s))
        return [step for _, step in measured[: self._config.keep_best]]

    def _read_scores(self) -> dict[str, float | None]:
        """Return the scores of the checkpoints by step, as text; those that `keep_best` compares.

        The best ones are verified: one that is corrupt would be kept in place of one that can be used. The newest is
        not, since it is verified when it is restored.
        """
        if not self._config.keep_best:
            return {}
        steps = steps_in(self._folder)
        scores = {step: self._read_score(step) for step in steps}
        verified = set(steps[-1:])
        while unverified := set(self._best(scores)) - verified:
            for step in unverified:
                verified.add(step)
                try:
                    verify_checkpoint(self._folder, step)
                except Exception as error:  # a bucket's library raises errors of its own
                    logger.warning("the checkpoint of step %d is corrupt (%s): not kept as the best one", step, error)
                    scores[step] = None
        return {str(step): score for step, score in scores.items()}

    def _read_score(self, step: int) -> float | None:
        try:
            return read_position(self._folder, step).get("score")
        except Exception:  # corrupt, which is reported when it is restored
            return None

    def _agreed(self, step: int, due: bool) -> bool:
        """Return the decision of the first process, since clocks differ; every ten steps, since all wait for it."""
        if multihost.process_count() == 1:
            return due
        return step % 10 == 0 and agreement.from_first("time of a checkpoint", lambda: due)

    def _delete(self, step: int) -> None:
        """Remove a checkpoint: first its name, then its files, so that no incomplete one is ever visible."""
        path = self._folder / str(step)
        if checksums.is_remote(path):
            (path / _COMMITTED).unlink()
        else:
            path = path.rename(self._folder / f"{_DELETED}{step}")
        path.rmtree()

    def _clean(self) -> None:
        """Remove what a kill left of saves and deletions. (In a bucket the next save of that step overwrites it.)"""
        for path in _list(self._folder):
            if path.name.startswith(_DELETED) or ".orbax-checkpoint-tmp" in path.name:
                path.rmtree()

    def restore(self, step: int, target: Any) -> Any:
        """Read this process's part of a state, see `run.restore`.

        By the handler: the checkpointer would wait for processes that fail.
        """
        args = _Items(state=ocp.args.StandardRestore(target))
        return jax.block_until_ready(self._handler.restore(self._folder / str(step), args=args).state)

    def move_aside(self, step: int) -> None:
        """Move a corrupt checkpoint to `damaged/` in the folder; in a bucket it loses the mark of a complete one."""
        self._scores.pop(step, None)
        if not self._is_first:
            return
        if checksums.is_remote(self._folder):
            (self._folder / str(step) / _COMMITTED).unlink()  # moving is not atomic in a bucket
        else:
            aside = self._folder / "damaged" / str(step)
            aside.parent.mkdir(exist_ok=True)
            if aside.exists():
                aside.rmtree()
            (self._folder / str(step)).rename(aside)


@contextlib.contextmanager
def _write_errors(folder: epath.Path) -> Iterator[None]:
    """Convert the error of a failed write to a UserError that says what is safe."""
    try:
        yield
    except Exception as error:
        if full := disk_problem(error):
            problem = f"a checkpoint could not be written to {folder}: {full}"
        elif isinstance(error, OSError):
            problem = f"a checkpoint could not be written to {folder} ({agreement.summary(error)}): fix that"
        else:
            raise
        raise UserError(
            f"{problem}; then give the same command again, which continues from the last complete checkpoint"
        ) from None
