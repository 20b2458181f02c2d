"""Profiler traces of some steps (`log.profile`), and the origin of a NaN (`train.debug`)."""

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from slm_jax.config.checks import profiled_steps
from slm_jax.config.schema import Config
from slm_jax.run.directory import Run
from slm_jax.training.session import RunStep
from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def traced_steps(config: Config, run: Run) -> Iterator[RunStep]:
    """Yield the function that runs a step with the traces and the NaN debugging (`jax_debug_nans`) of a config.

    Raises:
        UserError: The folder of the traces is a file.
    """
    search = jax.debug_nans(True) if config.train.debug else contextlib.nullcontext()
    with Profiler(config.log.profile, run.profile) as profiler, search:
        yield profiler.run


class Profiler:
    """Runs the training steps, those of `log.profile` under jax.profiler; a context manager that ends the trace."""

    def __init__(self, steps: str, folder: Path):
        """Prepare a trace; nothing is written before its first step.

        Args:
            steps: `log.profile`: FIRST:LAST, both included, or empty.
            folder: The folder of the traces.

        Raises:
            UserError: The folder is a file.
        """
        self._first, self._last = profiled_steps(steps) or (0, -1)
        self._folder = folder
        if steps and folder.exists() and not folder.is_dir():
            raise UserError(f"log.profile: {folder} should be a folder for traces, but is a file: remove it")
        self._is_tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_tracing:
            self._stop()

    def run(self, step: int, train_step: Callable[..., Any], *args: Any) -> Any:
        """Return `train_step(*args)`, traced if the step is one of those to trace.

        Args:
            step: The step, from 1.
            train_step: The function of the step.
            *args: Its arguments.

        Raises:
            UserError: With `train.debug`, the step produced a NaN; the operation is named.
        """
        try:
            if not self._first <= step <= self._last:
                return train_step(*args)
            return self._traced(step, train_step, *args)
        except FloatingPointError as error:
            raise UserError(f"step {step}: {_origin_of_nan(error)}") from error

    def _traced(self, step: int, train_step: Callable[..., Any], *args: Any) -> Any:
        if not self._is_tracing:
            jax.block_until_ready(args)  # steps that were dispatched before do not belong to the trace
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._is_tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = train_step(*args)
        if step == self._last:
            jax.block_until_ready(result)
            self._stop()
        return result

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._is_tracing = False
        newest = max(self._folder.glob("**/perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
        logger.info(
            "a trace of steps up to %d is in %s: open %s at https://ui.perfetto.dev, or, with pip install xprof: "
            "xprof --logdir %s",
            self._last,
            newest.parent,
            newest.name,
            self._folder,
        )


def _origin_of_nan(error: FloatingPointError) -> str:
    """Return the operation and line of this package that jax_debug_nans blames, having run the step unfused."""
    package = str(Path(__file__).parents[2])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(package) and frame.filename != __file__
    ]
    text = str(error).partition(". Because")[0].rstrip(".")
    if not frames:
        return text
    last = frames[-1]
    return f"{text}, in {last.name} ({Path(last.filename).name}:{last.lineno}): {last.line}"
