"""The training loop: step, measure, validate, save.

    while steps are left and no signal came:       nor has `train.stop_early` ended the run
        take the next batch                        made by a thread while the device computes
        dispatch the step                          the device is never waited for
        write the row of the step before           its metrics are ready by now
        validate, write samples                    every `eval.every` steps, and at the end
        score tasks                                every `eval.tasks_every` steps, and at the end
        save a checkpoint                          every `checkpoint.every` steps, and at the end
        collect garbage                            after a validation or a save, and at no other time

What the loop works with is in `session.Session`, which `setup` creates. The loop does not know which objective and
options a run has, nor whether it is traced or logged elsewhere: a session brings functions for all of these.
"""

from typing import Any

from slm_jax.data.batches.prefetch import Prefetcher
from slm_jax.distributed import multihost
from slm_jax.run.metrics import MetricsWriter
from slm_jax.run.samples import forget_samples_after
from slm_jax.training.recorder import StepRecorder
from slm_jax.training.result import Result
from slm_jax.training.session import Session, TrainStep
from slm_jax.training.signals import StopSignals
from slm_jax.training.train_step import TrainState
from slm_jax.utils.batch import Batch
from slm_jax.utils.garbage import collecting_garbage_on_request


def run_loop(session: Session) -> Result:
    """Train until the last step of the config or a signal, and save the state.

    Args:
        session: A run with steps left, which was not stopped early.

    Returns:
        The last step and its metrics.

    Raises:
        UserError: Training has diverged, or a file cannot be written.
    """
    config = session.config
    run = session.run
    is_first = multihost.is_first()
    loggers = session.open_loggers() if is_first else ()
    with (
        MetricsWriter(run.metrics, session.start, is_first, loggers) as metrics,
        StopSignals() as stop,
        session.running_steps() as run_step,
        StepRecorder(session, metrics) as recorder,
        Prefetcher(
            session.batches, session.shard_batch, session.start, config.train.steps, session.batch_part
        ) as prefetcher,
        collecting_garbage_on_request() as collect_garbage,
    ):
        if is_first:
            forget_samples_after(run.samples, session.start)
        state = session.state
        step = session.start
        saved = session.start
        patience = config.train.stop_early
        is_last = False
        while not is_last and not stop.requested():
            batch, num_bytes = prefetcher.next()
            step += 1
            train_step = _step_for(session, state, batch, recorder)
            state, step_metrics = run_step(step, train_step, state, batch)
            recorder.record(step, step_metrics, num_bytes)
            is_last = step == config.train.steps
            if is_last or step % config.eval.every == 0:
                recorder.validate(state.evaluated_weights, step)
                collect_garbage()
                is_last = is_last or recorder.trend.is_over(patience)
            if config.eval.tasks and (is_last or step % (config.eval.tasks_every or config.eval.every) == 0):
                recorder.score_tasks(state.evaluated_weights, step)
                collect_garbage()
            if session.checkpoints.due(step, recorder.score) or is_last:
                _save(session, state, step, recorder, metrics)
                saved = step
                collect_garbage()
        if saved != step:  # stopped by a signal
            _save(session, state, step, recorder, metrics)
        recorder.flush()
        recorder.report_data_wait(prefetcher.wait_seconds)
        session.checkpoints.wait()  # here, where a first signal does not end the process
    stopped_by = None if is_last else stop.signal
    return Result(run.path, step, recorder.last_row, stopped_by, stop.signal, recorder.trend)


def _step_for(session: Session, state: TrainState, batch: Batch, recorder: StepRecorder) -> TrainStep:
    """Return the compiled step for batches of this shape; a shape that is new is compiled first."""
    shape = batch["input_ids"].shape
    if shape not in session.programs:
        with recorder.pause(f"compiling for rows of {shape[1]} tokens"):
            session.programs[shape] = session.compile_step(state, batch)
    return session.programs[shape]


def _save(session: Session, state: Any, step: int, recorder: StepRecorder, metrics: MetricsWriter) -> None:
    """Start to save a checkpoint. The rows of its steps must be on disk before it is."""
    score = recorder.score
    recorder.flush()
    metrics.flush()
    session.checkpoints.save(step, state.saved_fields(), recorder.position, score)
