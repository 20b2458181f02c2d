"""Traces of chosen steps, and where a NaN came from."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from slm_jax.config.checks import profiled_steps
from slm_jax.utils.errors import UserError


class Profiler:
    """Takes the training steps, those of `log.profile` under jax.profiler; a context manager that ends the trace."""

    def __init__(self, steps: str, folder: Path, say: Callable[[str], None]):
        """steps: FIRST:LAST, both included, or empty. folder: takes the trace. Raises UserError if that is a file."""
        self._first, self._last = profiled_steps(steps) or (0, -1)
        self._folder, self._say = folder, say
        if steps and folder.exists() and not folder.is_dir():
            raise UserError(f"log.profile: {folder}, which should be a folder for traces, is a file: remove it")
        self._is_running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_running:
            self._stop()

    def take(self, step: int, train: Callable[..., Any], *args: Any) -> Any:
        """train(*args), step number `step` from 1. Raises UserError that says where a NaN arose (`train.debug`)."""
        try:
            if not self._first <= step <= self._last:
                return train(*args)
            return self._traced(step, train, *args)
        except FloatingPointError as error:
            raise UserError(f"step {step}: {_where(error)}") from error

    def _traced(self, step: int, train: Callable[..., Any], *args: Any) -> Any:
        if not self._is_running:
            jax.block_until_ready(args)  # what was dispatched before is no part of the trace
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._is_running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = train(*args)
        if step == self._last:
            jax.block_until_ready(result)
            self._stop()
        return result

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._is_running = False
        newest = max(self._folder.glob("**/perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
        self._say(
            f"a trace of steps up to {self._last} is in {newest.parent}: open {newest.name} at https://ui.perfetto.dev,"
            f" or, with pip install xprof: xprof --logdir {self._folder}"
        )


def _where(error: FloatingPointError) -> str:
    """What made the NaN, as jax_debug_nans found it by running the step operation by operation."""
    package = str(Path(__file__).parents[1])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(package) and frame.filename != __file__ and frame.name != "take"
    ]
    text = str(error).partition(". Because")[0].rstrip(".")
    if not frames:
        return text
    last = frames[-1]
    return f"{text}, in {last.name} ({Path(last.filename).name}:{last.lineno}): {last.line}"
