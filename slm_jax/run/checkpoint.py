"""Saving and restoring: Orbax, asynchronous, committed atomically, every byte checked when it is read again.

A checkpoint is a folder named after its step, which appears under that name only when it is whole:

    100/state/          parameters, optimizer state, step, key (Orbax)
        position/       where the run stands in its data, and what it was begun with (JSON)
        checksums.json  size and CRC-32 of every file (Orbax and TensorStore have none of the arrays' bytes)
"""

import contextlib
import itertools
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from slm_jax.config.schema import CheckpointConfig
from slm_jax.distributed import multihost
from slm_jax.run import checksums
from slm_jax.utils.errors import UserError, is_disk_full

_COMMITTED = "commit_success.txt"  # where a rename is not atomic, a checkpoint is whole once this is there
_DELETED = ".deleted-"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def open_folder(folder: str | Path | epath.Path) -> epath.Path:
    """A folder on this machine or of a bucket (gs://). Raises UserError where it cannot be read, or what reads buckets
    is missing."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates each save; what matters is raised
    text = str(folder)
    try:
        place = epath.Path(text if "://" in text else Path(text).absolute())
        place.exists()
    except ImportError as error:
        raise UserError(f"{text} needs a library that reads buckets: pip install gcsfs ({error})") from None
    except Exception as error:  # of a bucket anything may come
        raise UserError(f"the folder of checkpoints {text} cannot be read ({_short(error)})") from None
    return place


def steps_in(folder: epath.Path) -> list[int]:
    """The steps of the whole checkpoints in a folder, in order."""
    return sorted(int(p.name) for p in _list(folder) if p.name.isdigit() and _is_committed(p))


def _list(folder: epath.Path) -> list[epath.Path]:
    try:  # not by exists(), which says no as well where a bucket does not answer
        return list(folder.iterdir())
    except FileNotFoundError:  # a bucket has no empty folders
        return []


def _is_committed(place: epath.Path) -> bool:
    """Whether a folder that is named after a step is a whole checkpoint."""
    return not checksums.is_remote(place) or any(path.name == _COMMITTED for path in _list(place))


class _Handler(ocp.CompositeCheckpointHandler):
    """Writes and reads the items of a checkpoint; its checksums are on disk before it is committed."""

    def __init__(self) -> None:
        super().__init__(state=ocp.StandardCheckpointHandler(), position=ocp.JsonCheckpointHandler())

    def finalize(self, directory: epath.Path) -> None:
        """Called by Orbax in the thread that saves, on one process, when all files are written."""
        super().finalize(directory)
        checksums.write(directory)


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """What a _Handler takes."""


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save."""

    def __init__(self, folder: Path | epath.Path, config: CheckpointConfig):
        """folder is made if missing; config: when to save, and which checkpoints stay."""
        self._folder, self._config = open_folder(folder), config
        self._folder.mkdir(parents=True, exist_ok=True)
        self._is_first = multihost.is_first()
        if self._is_first:
            self._clean()
        self._writer = ocp.AsyncCheckpointer(_Handler())
        self._scores = {step: self._read_score(step) for step in steps_in(self._folder)} if config.keep_best else {}
        self._saved_at = time.monotonic()
        self._finishing: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.wait()
            self._writer.close()
        elif kind is not KeyboardInterrupt:  # a save in flight is given its chance, but must not hide the cause
            with contextlib.suppress(Exception):
                self.wait()
            with contextlib.suppress(Exception):
                self._writer.close()

    def due(self, step: int, score: float | None = None) -> bool:
        """Whether a checkpoint is to be made of this step; score: validation bits per byte, if it was measured.

        Called after every step. Raises what the save in flight has raised.
        """
        self.check()
        config = self._config
        if step % config.every == 0 or (config.keep_every and step % config.keep_every == 0):
            return True
        if config.minutes and self._agreed(step, time.monotonic() - self._saved_at >= 60 * config.minutes):
            return True
        return score is not None and step in self._best(self._scores | {step: score})

    def save(self, step: int, state: Any, position: dict[str, Any], score: float | None = None) -> None:
        """Begin to save state (arrays are copied before this returns) and its position in the run.

        Raises UserError if an earlier save failed.
        """
        self.wait()
        self._scores[step] = score
        whole = position | {"step": step, "score": score}
        args = _Items(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(whole))
        with _named_failures(self._folder):
            self._writer.save(self._folder / str(step), args=args, force=True)
        self._saved_at = time.monotonic()
        self._finishing = threading.Thread(target=self._finish, name="checkpoint", daemon=True)
        self._finishing.start()

    def _finish(self) -> None:
        """When the save in flight is committed, delete what need not stay."""
        try:
            self._writer.wait_until_finished()
            if self._is_first:
                steps = steps_in(self._folder)
                for step in set(steps) - self._kept(steps):
                    self._delete(step)
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raise what the save in flight has raised so far: UserError where the user can mend it."""
        if self._error is not None:
            error, self._error = self._error, None
            with _named_failures(self._folder):
                raise error

    def wait(self) -> None:
        """Until the save in flight is whole, and what it replaces is deleted. Raises UserError if it failed."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        self.check()

    def _kept(self, steps: list[int]) -> set[int]:
        config = self._config
        kept = {*steps[-config.keep :], *self._best({s: self._scores.get(s) for s in steps})}
        return kept | {step for step in steps if step and config.keep_every and step % config.keep_every == 0}

    def _best(self, scores: dict[int, float | None]) -> list[int]:
        """The steps of the lowest scores, `keep_best` of them."""
        measured = sorted((s, step) for step, s in scores.items() if s is not None and math.isfinite(s))
        return [step for _, step in measured[: self._config.keep_best]]

    def _read_score(self, step: int) -> float | None:
        try:
            return self._read_position(step).get("score")
        except Exception:  # damaged, which is told when it is restored
            return None

    def _agreed(self, step: int, due: bool) -> bool:
        """What the first process says: clocks differ. Asked every ten steps only, since all wait for the answer."""
        if multihost.process_count() == 1:
            return due
        return step % 10 == 0 and multihost.broadcast_from_first(lambda: due)

    def _delete(self, step: int) -> None:
        """Gone under its name at once; a kill in between leaves only what `_clean` removes."""
        place = self._folder / str(step)
        if checksums.is_remote(place):
            (place / _COMMITTED).unlink()
        else:
            place = place.rename(self._folder / f"{_DELETED}{step}")
        place.rmtree()

    def _clean(self) -> None:
        """Remove what a kill left of saves and deletions. (In a bucket the next save of that step writes over it.)"""
        for place in _list(self._folder):
            if place.name.startswith(_DELETED) or ".orbax-checkpoint-tmp" in place.name:
                place.rmtree()

    def restore_newest(
        self, target: Callable[[dict[str, Any]], Any], warn: Callable[[str], None] = _to_stderr
    ) -> tuple[Any, dict[str, Any]] | None:
        """(state, position) of the newest whole checkpoint, or None without any.

        target: the state's shapes, dtypes and shardings for a checkpoint's position; what it raises is raised. A
        damaged checkpoint is named through warn, moved aside to `damaged/` in the folder (in a bucket no longer taken
        for whole), and the one before it taken.
        Raises UserError if all are damaged, or if a whole one does not fit.
        """
        damaged = []
        for step in reversed(steps_in(self._folder)):
            place = self._folder / str(step)
            try:
                is_checked = checksums.verify(place)
                position = self._read_position(step)
            except Exception as error:  # whatever a damaged file makes the reader raise
                damaged.append(step)
                warn(_damage(step, error))
                continue
            wanted = target(position)
            try:
                args = _Items(state=ocp.args.StandardRestore(wanted))
                state = jax.block_until_ready(self._writer.restore(place, args=args).state)
            except Exception as error:
                if is_checked:
                    raise _misfit(place, error) from error
                damaged.append(step)  # of a version that had no checksums: it may be either
                warn(_damage(step, error))
                continue
            for bad in damaged:
                self._move_aside(bad)
            return state, position
        if damaged:
            raise UserError(
                f"no checkpoint in {self._folder} can be read (of steps {damaged}, see above): restore one from a "
                "backup, or begin another --run"
            )
        return None

    def _read_position(self, step: int) -> dict[str, Any]:
        args = _Items(position=ocp.args.JsonRestore())
        position = self._writer.restore(self._folder / str(step), args=args).position
        if position["step"] != step:
            raise checksums.DamagedError(f"it says it is of step {position['step']}")
        return dict(position)

    def _move_aside(self, step: int) -> None:
        if not self._is_first:
            return
        if checksums.is_remote(self._folder):  # nothing is moved there: it loses the mark that it is whole
            (self._folder / str(step) / _COMMITTED).unlink()
        else:
            aside = self._folder / "damaged" / str(step)
            aside.parent.mkdir(exist_ok=True)
            if aside.exists():
                aside.rmtree()
            (self._folder / str(step)).rename(aside)


@contextlib.contextmanager
def _named_failures(folder: epath.Path) -> Iterator[None]:
    """Turn a failed write into a UserError that says what is safe."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            problem = f"no space left on the disk for a checkpoint in {folder}: free some"
        elif isinstance(error, OSError):
            problem = f"a checkpoint could not be written to {folder} ({_short(error)}): mend that"
        else:
            raise
        raise UserError(
            f"{problem} and give the same command again; it continues from the last whole checkpoint"
        ) from None


def read_newest(
    folder: Path | epath.Path, item: dict[str, Any], warn: Callable[[str], None] = _to_stderr
) -> tuple[dict[str, Any], int]:
    """(some fields of the state, step) of the newest whole checkpoint; the folder is left as it is.

    item: for each field that is wanted its shapes, dtypes and shardings. A damaged checkpoint is named through warn and
    passed over. Raises UserError if there is none.
    """
    for found in _read(folder, item, warn):
        return found
    raise UserError(f"no usable checkpoint in {folder}")


def read_params(
    folder: Path | epath.Path, target: Any, warn: Callable[[str], None] = _to_stderr, average: int = 1
) -> tuple[Any, int]:
    """(parameters, step) of the newest whole checkpoint of a run, without its optimizer.

    average: the mean of the newest so many instead, each weighing the same, added up in float64 (Vaswani et al. 2017,
    section 6.1: the last 5 or 20). target: the parameters' shapes, dtypes and shardings. Otherwise as `read_newest`;
    raises UserError as well if there are fewer than `average`.
    """
    if average == 1:
        found, step = read_newest(folder, {"params": target}, warn)
        return found["params"], step
    total, steps = None, []
    for found, step in itertools.islice(_read(folder, {"params": target}, warn), average):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), found["params"])
        total = wide if total is None else jax.tree.map(np.add, total, wide)
        steps.append(step)
    if len(steps) < average:
        raise UserError(
            f"{folder} holds {len(steps)} whole checkpoints, of steps {steps}, not {average} to average: ask for "
            "fewer, or train with a larger --checkpoint.keep"
        )
    mean = jax.tree.map(lambda x, t: jax.device_put((x / average).astype(t.dtype), t.sharding), total, target)
    return mean, steps[0]


def _read(
    folder: Path | epath.Path, item: dict[str, Any], warn: Callable[[str], None]
) -> Iterator[tuple[dict[str, Any], int]]:
    """`read_newest` of every whole checkpoint, newest first."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    restore = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
    place = open_folder(folder)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        for step in reversed(steps_in(place)):
            is_checked = False
            try:
                is_checked = checksums.verify(place / str(step))
                found = reader.restore(place / str(step), args=ocp.args.Composite(state=restore)).state
                jax.block_until_ready(found)
            except Exception as error:  # whatever a damaged file makes the reader raise
                if is_checked:
                    raise _misfit(place / str(step), error) from error
                if (place / str(step)).exists():  # else a training process has just deleted it
                    warn(_damage(step, error))
                continue
            yield dict(found), step


def _misfit(place: epath.Path, error: Exception) -> Exception:
    if "RESOURCE_EXHAUSTED" in str(error):
        return error
    return UserError(
        f"the checkpoint {place} is whole, but its arrays are not those of this config: it was saved with another one, "
        f"or by another version of this program ({_short(error)})"
    )


def _damage(step: int, error: Exception) -> str:
    return f"checkpoint {step} is damaged and passed over ({_short(error)})"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
