"""Where rows of metrics go beside metrics.jsonl, which stays the truth: TensorBoard, Weights & Biases, trackio.

Each has the same methods; a run that goes on leaves each step there once. Needs pip install 'slm_jax[logging]'.
"""

import hashlib
import importlib
from typing import Any, Protocol

from slm_jax.config.schema import Config
from slm_jax.run.directory import Run
from slm_jax.run.metrics import Row, read_metrics
from slm_jax.utils.errors import UserError

_PROJECT = "slm_jax"


class Sink(Protocol):
    """One of them."""

    def __init__(self, config: Config, run: Run, after_step: int):
        """Takes rows after a step; what it holds of later ones is of a run that was killed, and takes its place."""

    def log(self, row: Row) -> None:
        """Send a row of metrics.jsonl."""

    def flush(self) -> None:
        """Rows so far are to survive a kill: a checkpoint is about to be made."""

    def close(self) -> None:
        """Send what is left."""


def make_sinks(config: Config, run: Run, after_step: int) -> list[Sink]:
    """The sinks of `log.sinks`, for rows after a step. Raises UserError if a library is missing."""
    return [_SINKS[name](config, run, after_step) for name in config.log.sinks]


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"--log.sinks needs {name.partition('.')[0]} ({error}): pip install 'slm_jax[logging]'"
        ) from None


def _name(run: Run) -> str:
    """One for each run directory, however often it goes on."""
    path = run.path.absolute()
    return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"


def _numbers(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("step", "time") and value is not None}


class TensorBoard(Sink):
    """Event files in `tensorboard/` of the run: tensorboard --logdir runs."""

    def __init__(self, config: Config, run: Run, after_step: int):
        writer = _library("tensorboard.summary.writer.event_file_writer")
        self._event = _library("tensorboard.compat.proto.event_pb2")
        self._summary = _library("tensorboard.compat.proto.summary_pb2").Summary
        self._writer = writer.EventFileWriter(str(run.path / "tensorboard"))
        # Where TensorBoard reads that a session starts, it drops the events of that step and later ones.
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._writer.add_event(self._event.Event(step=after_step + 1, session_log=start))

    def log(self, row: Row) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in _numbers(row).items()]
        event = self._event.Event(wall_time=row["time"], step=row["step"], summary=self._summary(value=values))
        self._writer.add_event(event)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Service(Sink):
    """Keeps all that it is sent: steps that it has are not sent again (they have the same values), those that a kill
    kept from it are."""

    def __init__(self, config: Config, run: Run, after_step: int):
        self._run, self._newest = self._begin(config, run)
        for row in read_metrics(run.metrics):
            if row["step"] <= after_step:
                self.log(row)

    def _begin(self, config: Config, run: Run) -> tuple[Any, int]:
        """The library's run, and the newest step that it has."""
        raise NotImplementedError

    def log(self, row: Row) -> None:
        if row["step"] > self._newest:
            self._run.log(_numbers(row), step=row["step"])

    def flush(self) -> None:
        pass  # the next call sends what is missing

    def close(self) -> None:
        self._run.finish()


class Wandb(_Service):
    """Weights & Biases, project slm_jax; with WANDB_MODE=offline in `wandb/` of the run, until `wandb sync`."""

    def _begin(self, config: Config, run: Run) -> tuple[Any, int]:
        name, folder = run.path.absolute().name, str(run.path)
        of_library = _library("wandb").init(
            project=_PROJECT, name=name, id=_name(run), resume="allow", dir=folder, config=config.flat()
        )
        return of_library, of_library.step - 1  # offline: nothing, and the server takes each step once


class Trackio(_Service):
    """trackio (Hugging Face), project slm_jax: a local file, shown by `trackio show`, or what its settings say."""

    def _begin(self, config: Config, run: Run) -> tuple[Any, int]:
        library, name = _library("trackio"), _name(run)
        newest = library.SQLiteStorage.get_max_step_for_run(_PROJECT, name) or 0
        return library.init(project=_PROJECT, name=name, resume="allow", config=config.flat(), embed=False), newest


_SINKS: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
