"""Metrics, progress, validation and samples of the training loop.

The metrics of a step stay on the device until the next step has been dispatched, so that the device never waits for
Python: each row is written one step late.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import jax

from slm_jax.distributed import agreement, multihost
from slm_jax.run.metrics import MetricsWriter, Row, progress_text, scores_text, tasks_text
from slm_jax.run.samples import append_samples
from slm_jax.training.session import Session
from slm_jax.utils.formatting import duration
from slm_jax.utils.progress import ProgressBar

logger = logging.getLogger(__name__)

_CONSIDERABLE_WAIT = 0.1  # of the time of a call, waiting for data


class StepRecorder:
    """Writes the row of each step with its timing, shows progress, and validates; a context manager.

    Attributes:
        last_row: The newest row.
        trend: The validations so far.
    """

    def __init__(self, session: Session, metrics: MetricsWriter):
        """Open the progress bar and layers.jsonl.

        Args:
            session: The session of the loop.
            metrics: The writer of `metrics.jsonl`.
        """
        config = session.config
        self._session = session
        self._config = config
        self._metrics = metrics
        self._is_first = multihost.is_first()
        self._layers: MetricsWriter | None = None
        if config.log.layers:
            self._layers = MetricsWriter(session.run.layers, session.start, self._is_first)
        self._devnull = None if self._is_first else open(os.devnull, "w")  # noqa: SIM115, PTH123
        self._progress = ProgressBar(config.train.steps, session.start, config.log.every, self._devnull)
        self.last_row = metrics.last
        self.trend = session.trend
        self._rise_is_reported = session.trend.has_risen  # by the call before
        self._pending: tuple[int, dict[str, Any], Row] | None = None  # step, metrics on the device, further fields
        # Time of steps and validations, without compilation: in total, and before this call.
        self._seconds = metrics.seconds
        self._seconds_before = metrics.seconds
        self._step_began = time.perf_counter()
        self._step_seconds = 0.0  # running mean
        self._timed_steps = 0

    def __enter__(self) -> "StepRecorder":
        self._step_began = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.close()
        if self._layers is not None:
            self._layers.close()
        if self._devnull is not None:
            self._devnull.close()

    @property
    def score(self) -> float | None:
        """The score of the newest step that checkpoints are chosen by, if it was measured."""
        return None if self._pending is None else self._pending[2].get(self._session.score_name)

    @property
    def position(self) -> dict[str, Any]:
        """JSON values to store with a checkpoint of the newest step."""
        return self._session.compatibility | {"validation": self.trend.to_json()}

    def record(self, step: int, metrics: dict[str, Any], num_bytes: int) -> None:
        """Take the metrics of a step and write the row of the step before.

        Args:
            step: The step, from 1.
            metrics: Its metrics, still on the device.
            num_bytes: Bytes of text that its targets stand for.

        Raises:
            UserError: Training has diverged.
        """
        self.flush()
        self._pending = (step, metrics, {"bytes": num_bytes})

    def flush(self) -> None:
        """Wait for the metrics of the newest step, check them, write its row and show it.

        Raises:
            UserError: Training has diverged.
        """
        if self._pending is None:
            return
        step, metrics, extra = self._pending
        self._pending = None
        layers = metrics.pop("layers", None)
        row: Row = {"step": step} | {name: float(value) for name, value in metrics.items()}
        row |= {name: int(row[name]) for name in ("tokens", "input_tokens")}
        row |= extra
        row = self._session.check_row(row)  # before a checkpoint of this step is saved
        if self._layers is not None and step % self._config.log.layers == 0:
            self._layers.write(self._session.layers_row(step, layers))
        row |= self._timing(step, row["input_tokens"], row.get("mean_context"))
        self._metrics.write(row)
        self._progress.show(step, progress_text(row))
        self.last_row = row

    def _timing(self, step: int, input_tokens: int, context: float | None) -> Row:
        """Return the fields of a row that depend on the clock; see `Session.flops_per_token` for the context."""
        now = time.perf_counter()
        elapsed = now - self._step_began
        self._step_began = now
        self._seconds += elapsed
        self._timed_steps += 1
        # A mean over all steps at first, over about ten later, and never over the first step, which is slow.
        weight = max(0.1, 1 / max(self._timed_steps - 1, 1))
        self._step_seconds += weight * (elapsed - self._step_seconds)
        rate = input_tokens / self._step_seconds  # tokens without a target cost FLOPs as well
        return {
            "seconds": self._seconds,
            "tokens_per_second": rate,
            "mfu": rate * self._session.flops_per_token(context) / self._session.peak_flops,
            "eta_seconds": (self._config.train.steps - step) * self._step_seconds,
            "time": time.time(),
        }

    def validate(self, weights: Any, step: int) -> None:
        """Score the newest parameters on the held-out text and append samples; the scores join the step's row.

        Args:
            weights: All parameters after the newest step, `TrainState.evaluated_weights`.
            step: That step.
        """
        assert self._pending is not None
        began = self._wait_for_step()
        own = self._session.validate(weights)
        # What is kept and when to stop depends on the scores: not on sums that one process has rounded otherwise.
        scores = agreement.from_first("validation scores", lambda: own)
        self._pending[2].update(scores)
        self.trend = self.trend.add(step, scores["val_loss"], scores[self._session.score_name])
        texts = self._session.generate_samples(weights)
        if texts:
            append_samples(self._session.run.samples, step, texts)
        self._count_beside_steps(began)
        logger.info("step %d: validation %s", step, scores_text(scores))
        self._report_rise()

    def score_tasks(self, weights: Any, step: int) -> None:
        """Score the parameters that are validated on `eval.tasks`; the scores join the step's row.

        Args:
            weights: All parameters after the newest step, `TrainState.evaluated_weights`.
            step: That step.
        """
        assert self._pending is not None
        began = self._wait_for_step()
        scores = self._session.score_tasks(weights)
        self._pending[2].update(scores)
        elapsed = self._count_beside_steps(began)
        logger.info("step %d: tasks %s, in %s", step, tasks_text(scores) or "not scored", duration(elapsed))

    def _report_rise(self) -> None:
        """Warn of a rising validation loss: once, until it falls below its lowest value."""
        self._rise_is_reported &= self.trend.since_best > 0
        if self._rise_is_reported or not self.trend.has_risen:
            return
        self._rise_is_reported = True
        if self._is_first:  # all processes have the same scores
            logger.warning(self._session.rise_text(self.trend, self.last_row.get("loss")))

    @contextlib.contextmanager
    def pause(self, text: str) -> Iterator[None]:
        """Log what happens between two steps and exclude it from their time."""
        logger.info(text)
        began = self._wait_for_step()
        yield
        self._step_began += time.perf_counter() - began

    def _count_beside_steps(self, began: float) -> float:
        """Add the time since `began` to that of the run, not to that of a step; return it in seconds."""
        elapsed = time.perf_counter() - began
        self._seconds += elapsed
        self._step_began += elapsed
        return elapsed

    def _wait_for_step(self) -> float:
        """Wait until the device has finished the newest step; return the time."""
        if self._pending is not None:
            jax.block_until_ready(self._pending[1])
        return time.perf_counter()

    def report_data_wait(self, seconds: float) -> None:
        """Log the share of the time of this call that was spent waiting for data, if it is large."""
        share = seconds / max(self._seconds - self._seconds_before, 1e-9)
        if share >= _CONSIDERABLE_WAIT:
            logger.info("note: %.0f%% of the time was spent waiting for data", 100 * share)
