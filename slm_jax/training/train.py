"""`train(config)`: from text to a trained model in a run directory; also `python -m slm_jax.train`.

    begin      the run directory: created, or checked against the config          run/directory.py
    set up     mesh, tokenizer and text, restored or initial state, compiled step  training/setup.py
    trial      of a new run with train.minutes: times steps, fixes their number    training/trial.py
    loop       step, measure, validate, save                                       training/loop.py
    report     training curve and report.html                                      report/

Each phase finds what an earlier call has finished. The same command on a run that was stopped, or killed at any
instant, resumes it and ends with the same parameters and metrics.
"""

import contextlib
import logging
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_jax.config.conversion import loaded
from slm_jax.config.schema import Config
from slm_jax.data.sources.files import find_files
from slm_jax.distributed import agreement, multihost
from slm_jax.distributed.software import require_same_software
from slm_jax.run.directory import Run
from slm_jax.run.metrics import read_metrics
from slm_jax.run.naming import new_run, removed_if_unused
from slm_jax.run.speed_trial import with_steps_of_trial
from slm_jax.training.result import Result
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import PARTIAL
from slm_jax.utils.progress import show_log

logger = logging.getLogger(__name__)


def train(
    config: Config | str | Path | dict[str, Any], run: str | Path | None = None, began: float | None = None
) -> Result:
    """Train a model, or resume its training.

    SIGINT, SIGTERM and SIGHUP end training after the current step, with a checkpoint; a second one ends the process at
    once.

    Args:
        config: All options, see `Config.load`; the name of a preset, the path of a TOML file, or nested dicts.
        run: The run directory. A run in it is resumed; None: a new one in `runs/`.
        began: Start of the minutes of `train.minutes` as `time.monotonic()`; None: now.

    Returns:
        The run directory, the last step and its metrics.

    Raises:
        UserError: The config does not fit the run, the data or the devices, training has diverged, or a file cannot be
            read or written.
        TypeError: `config` is none of these.
    """
    began = time.monotonic() if began is None else began
    show_log(multihost.log_prefix())
    return _train(_with_absolute_paths(loaded(config, Config)), run, began)


def _train(config: Config, run: str | Path | None, began: float) -> Result:
    """Train with valid options and absolute paths."""
    require_same_software()
    shared = {name: value for name, value in config.flat().items() if name not in Config.fields_with("per_host")}
    agreement.require_same("the options", lambda: shared, "give the same command to all processes")
    directory = Run(Path(agreement.from_first("run directory", lambda: _directory(config, run))))
    logger.info("run: %s", directory.path)
    with _locked(directory, config):
        agreement.from_first("start of the run", lambda: directory.begin(config))
        _require_shared(directory)
        # These import JAX: until here an invalid option is reported without waiting for it.
        from slm_jax.data.sources.unused_options import log_unused_options
        from slm_jax.training.loop import run_loop
        from slm_jax.training.setup import compile_session, log_start, open_run

        if multihost.is_first():
            log_unused_options(config)
        config, needs_trial = with_steps_of_trial(config, directory)
        with open_run(config, directory) as opened:
            if needs_trial:
                from slm_jax.training.trial import run_trial

                opened = run_trial(opened, began)
            log_start(opened)
            result = opened.finished or run_loop(compile_session(opened))
        if multihost.is_first():
            _write_curve_and_report(directory)
        return result


def _directory(config: Config, run: str | Path | None) -> str:
    """Return the directory of a run; missing text files are reported before a new one is named.

    Raises:
        UserError: A text file is missing.
    """
    if config.data.source == "files" and not (run and Run(Path(run)).corpus.is_dir()):
        find_files(config.data.files)
    return str(run or new_run(config).path)


def _write_curve_and_report(run: Run) -> None:
    """Draw the training curve and write the report, unless they are newer than the metrics."""
    from slm_jax.report.page import write_report_after_training
    from slm_jax.report.training_plot import plot_training

    if not run.metrics.is_file():
        return
    if run.plot.is_file() and run.plot.stat().st_mtime_ns >= run.metrics.stat().st_mtime_ns:
        return
    plot_training(read_metrics(run.metrics), run.plot, run.path.name)
    write_report_after_training(run)


@contextlib.contextmanager
def _locked(run: Run, config: Config) -> Iterator[None]:
    """Hold the lock of a run in the first process; remove a new directory if there is no text for it."""
    if not multihost.is_first():
        yield
        return
    is_new = run.is_new()
    with removed_if_unused(run), run.lock(config.checkpoint.folder):
        try:
            yield
        except BaseException:
            if is_new and not run.corpus.is_dir():
                shutil.rmtree(run.path, ignore_errors=True)
            raise


def _require_shared(run: Run) -> None:
    """Refuse a run directory that is not the same for all processes.

    The file that all of them look for has a new name each time: a network file system may remember for a while that a
    file did not exist, or what was in it.

    Raises:
        UserError: A process does not see it; names the process.
    """
    if multihost.process_count() == 1:
        return

    def make() -> str:
        name = f".{secrets.token_hex(8)}{PARTIAL}"
        (run.path / name).touch()
        return name

    mark = run.path / agreement.from_first("mark in the run directory", make)

    def find() -> None:
        if not mark.exists():
            raise UserError(f"{run.path.absolute()} is not that of process 0: all must see the same file system")

    try:
        agreement.gather("view of the run directory", find)
    finally:
        if multihost.is_first():
            mark.unlink()


def _with_absolute_paths(config: Config) -> Config:
    """Return the config with absolute `checkpoint.folder` and files of `eval.tasks`: a run can be resumed anywhere."""
    tasks = config.eval.model_copy(update={"tasks": with_absolute_files(config.eval.tasks)})
    config = config.model_copy(update={"eval": tasks})
    folder = config.checkpoint.folder
    if not folder or "://" in folder:
        return config
    section = config.checkpoint.model_copy(update={"folder": str(Path(folder).expanduser().absolute())})
    return config.model_copy(update={"checkpoint": section})


def with_absolute_files(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Return arguments of `eval.tasks`, one each, with absolute paths."""
    absolute = []
    for argument in (part.strip() for text in tasks for part in text.split(",")):
        title, equals, path = argument.partition("=")
        is_local = bool(path) and not path.startswith("hf:")
        absolute.append(f"{title}{equals}{Path(path).expanduser().absolute() if is_local else path}")
    return tuple(absolute)
