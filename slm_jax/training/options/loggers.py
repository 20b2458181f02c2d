"""Loggers: where the rows of metrics.jsonl are sent as well (`log.sinks`): TensorBoard, Weights & Biases, trackio.

metrics.jsonl stays the record. A resumed run leaves each step once in every logger. The libraries come with
pip install -e '.[logging]'. To add a logger, write a class with the methods of `Logger`, enter it in `_LOGGERS`, and
add its name to the option `log.sinks`.
"""

import hashlib
import importlib
from typing import Any, Protocol

from slm_jax.config.schema import Config
from slm_jax.run.directory import Run
from slm_jax.run.metrics import Row, RowLogger, read_metrics
from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import install_command

_PROJECT = "slm_jax"


class Logger(RowLogger, Protocol):
    """A destination of metrics rows."""

    def __init__(self, config: Config, run: Run, after_step: int):
        """Open the logger for the rows after a step.

        Args:
            config: The config of the run.
            run: The run directory.
            after_step: The step of the checkpoint that training resumes from. Rows of later steps that the logger has
                are of a run that was killed; they are repeated.

        Raises:
            UserError: The library is missing.
        """


def make_loggers(config: Config, run: Run, after_step: int) -> list[RowLogger]:
    """Return the loggers of `log.sinks`, opened for the rows after a step.

    Raises:
        UserError: The library of one is missing.
    """
    return [_LOGGERS[name](config, run, after_step) for name in config.log.sinks]


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--log.sinks needs {name.partition('.')[0]} ({error}): {install_command('logging')}") from None


def _run_name(run: Run) -> str:
    """Return a name that belongs to the run directory, the same whenever the run is resumed."""
    path = run.path.absolute()
    return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"


def _numbers(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("step", "time") and value is not None}


class TensorBoardLogger:
    """Event files in `tensorboard/` of the run, shown by `tensorboard --logdir runs`."""

    def __init__(self, config: Config, run: Run, after_step: int):
        """Open an event file, see `Logger`."""
        writer = _import("tensorboard.summary.writer.event_file_writer")
        self._event = _import("tensorboard.compat.proto.event_pb2")
        self._summary = _import("tensorboard.compat.proto.summary_pb2").Summary
        self._writer = writer.EventFileWriter(str(run.path / "tensorboard"))
        # TensorBoard drops the events of this step and later ones when it reads that a session starts.
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._writer.add_event(self._event.Event(step=after_step + 1, session_log=start))

    def log(self, row: Row) -> None:
        """Send a row."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in _numbers(row).items()]
        event = self._event.Event(wall_time=row["time"], step=row["step"], summary=self._summary(value=values))
        self._writer.add_event(event)

    def flush(self) -> None:
        """Write the rows so far to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class _ServiceLogger:
    """A service that keeps every row it has received.

    On resume, steps that it has are not sent again (they have the same values), and those that it has missed are.
    """

    def __init__(self, config: Config, run: Run, after_step: int):
        self._service_run, self._newest = self._open(config, run)
        for row in read_metrics(run.metrics):
            if row["step"] <= after_step:
                self.log(row)

    def _open(self, config: Config, run: Run) -> tuple[Any, int]:
        """Return the library's run, and the newest step that it has."""
        raise NotImplementedError

    def log(self, row: Row) -> None:
        """Send a row, unless the service has its step."""
        if row["step"] > self._newest:
            self._service_run.log(_numbers(row), step=row["step"])

    def flush(self) -> None:
        """Do nothing: rows that are lost are sent when the run is resumed."""

    def close(self) -> None:
        """Send the remaining rows."""
        self._service_run.finish()


class WandbLogger(_ServiceLogger):
    """Weights & Biases, project slm_jax; with WANDB_MODE=offline in `wandb/` of the run, until `wandb sync`."""

    def _open(self, config: Config, run: Run) -> tuple[Any, int]:
        service_run = _import("wandb").init(
            project=_PROJECT,
            name=run.path.absolute().name,
            id=_run_name(run),
            resume="allow",
            dir=str(run.path),
            config=config.flat(),
        )
        return service_run, service_run.step - 1  # offline it is 0: all steps are sent, and the server keeps each once


class TrackioLogger(_ServiceLogger):
    """trackio (Hugging Face), project slm_jax: a local database, shown by `trackio show`."""

    def _open(self, config: Config, run: Run) -> tuple[Any, int]:
        trackio = _import("trackio")
        name = _run_name(run)
        newest = trackio.SQLiteStorage.get_max_step_for_run(_PROJECT, name) or 0
        return trackio.init(project=_PROJECT, name=name, resume="allow", config=config.flat(), embed=False), newest


_LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger, "trackio": TrackioLogger}
