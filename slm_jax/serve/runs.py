"""The runs that the page shows: those that are served and the others of a folder, also while they train."""

import contextlib
import functools
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.run.directory import Run, stages_in
from slm_jax.utils.errors import UserError

_CURVE_POINTS = 150
_CURVE_FIELDS = ("loss", "val_loss", "lr", "val_bits_per_byte")
_MAX_LISTED = 200  # runs of a folder, the newest
_TAIL_BYTES = 1 << 16
_KEPT_CURVES = 16  # runs whose rows are kept in memory


def model_name(path: Path) -> str:
    """Return the name by which clients request a run: the folder's; for a stage of a curriculum CURRICULUM-STAGE."""
    return f"{path.parent.parent.name}-{path.name}" if path.parent.name == "stages" else path.name


def runs_in(folder: Path) -> list[Run]:
    """Return the runs in a folder, and the stages of the curricula in it, the newest first."""
    runs: list[Run] = []
    for path in folder.glob("*"):
        with contextlib.suppress(UserError, OSError):  # a folder that this user cannot read
            runs += [Run(path)] if Run(path).exists() else [Run(stage) for stage in stages_in(path)]
    return sorted(runs, key=lambda run: _modified(run.metrics) or _modified(run.config), reverse=True)


def _modified(path: Path) -> float:
    """Return the time of the last modification; 0 if there is no such file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


class RunList:
    """The runs that the page may show. Clients name them; no name is ever made into a path."""

    def __init__(self, served: Callable[[], Mapping[str, tuple[Run, int]]], folders: Sequence[Path] = ()):
        """Create the list.

        Args:
            served: Returns run and loaded step of each served model, by name.
            folders: Folders whose other runs are listed as well, new ones included.
        """
        self._served = served
        self._folders = [folder.absolute() for folder in folders]
        self._curves: dict[Path, _Curves] = {}
        self._lock = threading.Lock()

    def runs(self) -> dict[str, Run]:
        """Return the runs by name, the served ones first."""
        runs = {name: run for name, (run, _) in self._served().items()}
        known = {run.path.resolve() for run in runs.values()}
        others = [run for folder in self._folders for run in runs_in(folder)[:_MAX_LISTED]]
        for run in others:
            if run.path.resolve() not in known:
                runs.setdefault(model_name(run.path), run)
        return runs

    def describe(self) -> list[dict[str, Any]]:
        """Return a description of each run.

        Returns:
            "id"; "loaded", the step of the served model, or null; "saved", the step of the newest checkpoint, or null;
            "step", that of the newest row of the metrics; "steps", those that are planned; "report", whether there is
            a report.html; "held_out" and "tokenizer", digests that tell whether losses can be compared, as "objective"
            does, the training objective.
        """
        served = self._served()
        described = []
        for name, run in self.runs().items():
            try:
                saved = run.newest_step()
                train = run.read_options().get("train", {})
            except UserError:  # removed, or being written
                continue
            described.append(
                {
                    "id": name,
                    "loaded": served[name][1] if name in served else None,
                    "saved": saved,
                    "step": _last_step(run.metrics),
                    "steps": train.get("steps", 0),
                    "report": run.report.is_file(),
                    "held_out": _held_out_digest(run),
                    "tokenizer": _tokenizer_digest(run),
                    "objective": train.get("objective", "next-token"),
                }
            )
        return described

    def version(self, name: str) -> str | None:
        """Return a text that changes when the curves of a run do; None if there is no such run."""
        run = self.runs().get(name)
        if run is None:
            return None
        try:
            status = run.metrics.stat()
        except OSError:
            return "none"
        return f"{status.st_size:x}-{status.st_mtime_ns:x}"

    def curves(self, name: str, width: int = 0) -> dict[str, Any]:
        """Return the curves of a run, see `read_curves`; only rows that are new since the last call are read.

        Args:
            name: Its name, one of `runs`.
            width: Steps of a point; 0: as the length of the run asks for.
        """
        path = self.runs()[name].metrics
        with self._lock:
            curves = self._curves.pop(path, None) or _Curves(path)
            self._curves[path] = curves  # the last one: the first ones are dropped
            while len(self._curves) > _KEPT_CURVES:
                self._curves.pop(next(iter(self._curves)))
            curves.update()
            return curves.points(width)


def read_curves(path: Path, width: int = 0) -> dict[str, Any]:
    """Read the learning curves of a run.

    Args:
        path: metrics.jsonl of the run; it may be growing or missing, and damaged lines are skipped.
        width: Steps of a point; 0: a power of two for about 150 points. Runs in one chart need the same: the mean of
            more steps varies less.

    Returns:
        Points [step, value] of each field that the page draws, means over steps, and "width".
    """
    curves = _Curves(path)
    curves.update()
    return curves.points(width)


class _Curves:
    """The values of the fields that the page draws, read from a growing file."""

    def __init__(self, path: Path):
        self._path = path
        self._clear()

    def _clear(self) -> None:
        self._file = 0  # the inode: a run that is resumed replaces the file
        self._offset = 0
        self._last = 0
        self._values: dict[str, list[tuple[float, float]]] = {name: [] for name in _CURVE_FIELDS}

    def update(self) -> None:
        """Read the complete lines that are new, or all if the file is another one."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file or status.st_size < self._offset:
                    self._clear()
                    self._file = status.st_ino
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self._add(line)
        except OSError:
            self._clear()

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        self._last = max(self._last, row["step"])
        for name, values in self._values.items():
            value = row.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                values.append((row["step"], value))

    def points(self, width: int) -> dict[str, Any]:
        """Return the points of each field, means over `width` steps."""
        if not width:
            width = 1 << max(0, -(-self._last // _CURVE_POINTS) - 1).bit_length()
        curves: dict[str, Any] = {"width": width}
        for name, values in self._values.items():
            points = np.array(values, float).reshape(-1, 2)
            points = points[np.argsort(points[:, 0], kind="stable")]
            bins = (points[:, 0] - 1) // width
            segments = np.split(points, np.flatnonzero(np.diff(bins)) + 1) if len(points) else []
            curves[name] = [segment.mean(axis=0).round(6).tolist() for segment in segments]
        return curves


def _last_step(path: Path) -> int:
    """Return the step of the last complete row of metrics; 0 without any."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return int(row["step"])
    return 0


def _held_out_digest(run: Run) -> str:
    """Return a digest of the text that a run is validated on; "" if that is not known."""
    try:
        limit = run.read_options().get("eval", {}).get("max_tokens", 0)
    except UserError:
        return ""
    digest = _documents_digest(run.corpus, _modified(run.corpus / "manifest.json"))
    return f"{digest}-{limit}" if digest else ""


@functools.lru_cache(maxsize=2 * _MAX_LISTED)
def _documents_digest(corpus: Path, modified: float) -> str:
    """Return a digest of the held-out documents of a corpus; it depends on the text, not on the tokenizer."""
    try:
        files = sorted(corpus.glob("**/validation-*.documents.npy"))
        digests = [np.load(file, mmap_mode="r")["digest"] for file in files]
    except Exception:  # NumPy evaluates the header of a damaged file, with exceptions of any kind
        return ""
    return hashlib.sha256(np.sort(np.concatenate(digests)).tobytes()).hexdigest()[:16] if digests else ""


def _tokenizer_digest(run: Run) -> str:
    return _file_digest(run.tokenizer, _modified(run.tokenizer))


@functools.lru_cache(maxsize=2 * _MAX_LISTED)
def _file_digest(path: Path, modified: float) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return ""
