"""Speed trial of `train.minutes`: how many steps fit into the time.

The real step is compiled and timed on the first batches, and so are a validation, its samples and a checkpoint. The
state of the trial is its own and is dropped: batch n is a function of n, so that the run that follows is the one that
`train.steps` with the chosen number would have started. The minutes count from the start of the command, or of the call
of `train`, and include preparing the text, compiling twice, the trial, validations, tasks, checkpoints and the report.

The step is compiled twice because the number of steps is a constant of its schedules, as in a run with `train.steps`.
As an argument of the program it would not give the same bits: of 333 to 1,000 steps, 13 to 24 % had a learning rate
that differed in the last bit (`wsd` and `cosine`, on a CPU).
"""

import dataclasses
import logging
import math
import shlex
import shutil
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.config.schema import MAX_STEPS, Config
from slm_jax.data.batches.prefetch import Prefetcher
from slm_jax.distributed import agreement, multihost, sharding
from slm_jax.performance.roofline import mfu_baseline
from slm_jax.run.checkpoint import Checkpoints
from slm_jax.run.directory import Run
from slm_jax.run.speed_trial import SpeedTrial, with_steps, write_trial
from slm_jax.training import memory
from slm_jax.training.compile_time import call_time
from slm_jax.training.sample_texts import sampling_function
from slm_jax.training.setup import OpenRun, make_validation
from slm_jax.training.steps import make_steps
from slm_jax.training.tasks import TrainingTasks
from slm_jax.training.train_step import TrainState
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import PARTIAL
from slm_jax.utils.formatting import duration

logger = logging.getLogger(__name__)

_SHARE = 0.03  # of the minutes that steps are timed for
_MIN_SECONDS = 2.0
_MAX_SECONDS = 60.0
_MIN_STEPS = 10  # timed, unless they take longer than three times the share
_FIRST_STEPS = 3  # timed, from which the number of steps to time follows
_UNTIMED_STEPS = 2  # the first ones are slower
_REPEATED_BELOW = 5.0  # seconds of a first validation, or of tasks, that are timed a second time: later ones are faster
_AFTERWARDS = 3.0  # seconds for the learning curve and the report
_WORTHWHILE_STEPS = 100  # of the minutes that the error for too few recommends


class Times(NamedTuple):
    """Times of a trial in seconds, see `SpeedTrial`."""

    steps: int
    step: float
    validation: float
    first_validation: float
    save: float
    compilation: float
    tasks: float = 0.0


def run_trial(opened: OpenRun, began: float) -> OpenRun:
    """Choose the steps of a new run by a speed trial, and save their number.

    Args:
        opened: A run without steps.
        began: Start of the call as `time.monotonic()`, from which the minutes count.

    Returns:
        The run with the number of steps.

    Raises:
        UserError: No step fits into the time.
    """
    config = opened.config
    minutes = config.train.minutes
    prepared = agreement.from_first("start of the speed trial", lambda: time.monotonic() - began)
    if prepared >= 60 * minutes:
        raise _too_short(opened.run, minutes, f"preparing the text took {duration(prepared)}", 2 * prepared)
    logger.info("train.minutes %g: timing steps", minutes)
    own = _measure(opened)

    def choose() -> dict[str, Any]:
        before = time.monotonic() - began
        steps = steps_that_fit(config, own, 60 * minutes - before)
        if steps < 1:
            found = f"preparing and compiling took {duration(before)}, and no step of {own.step:.3g} s fits"
            raise _too_short(opened.run, minutes, found, before + _needed(config, own, _WORTHWHILE_STEPS))
        trial = SpeedTrial(
            minutes=minutes,
            steps=steps,
            timed_steps=own.steps,
            step_seconds=own.step,
            validation_seconds=own.validation,
            first_validation_seconds=own.first_validation,
            save_seconds=own.save,
            tasks_seconds=own.tasks,
            compile_seconds=own.compilation,
            preparation_seconds=prepared,
            seconds_before=before,
        )
        write_trial(opened.run, trial)
        return dataclasses.asdict(trial)

    trial = agreement.from_first("steps of train.minutes", choose)
    logger.info(
        "train.minutes %g: %s steps of %.3g s (%d were timed), validations of %.3g s, checkpoints of %.3g s, tasks of "
        "%.3g s; a run that is resumed keeps the steps",
        minutes,
        f"{trial['steps']:,}",
        trial["step_seconds"],
        trial["timed_steps"],
        trial["validation_seconds"],
        trial["save_seconds"],
        trial["tasks_seconds"],
    )
    config = with_steps(config, trial["steps"])
    return dataclasses.replace(
        opened, config=config, steps=make_steps(config, opened.tokenizer.vocab_size, opened.mesh)
    )


def steps_that_fit(config: Config, times: Times, seconds: float, afterwards: float = _AFTERWARDS) -> int:
    """Return how many steps fit into a time, with their validations, tasks and checkpoints.

    The step is compiled again before them, because its schedule depends on their number.

    Args:
        config: The intervals of validations and checkpoints.
        times: Times of the trial.
        seconds: Time left after the trial.
        afterwards: Seconds of it that the learning curve and the report take.
    """
    low, high = 0, min(max(1, int(seconds / times.step) + 1), MAX_STEPS + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _needed(config, times, middle, afterwards) <= seconds else (low, middle)
    return low


def _needed(config: Config, times: Times, steps: int, afterwards: float = _AFTERWARDS) -> float:
    """Return the seconds from the end of the trial to the end of a call that takes some steps."""
    validations = math.ceil(steps / config.eval.every)
    saves = math.ceil(steps / config.checkpoint.every)
    if config.checkpoint.keep_best:  # a validation that is the best so far is saved as well
        saves += sum(step % config.checkpoint.every > 0 for step in range(0, steps, config.eval.every))
    scored = math.ceil(steps / (config.eval.tasks_every or config.eval.every)) * times.tasks
    once = times.compilation + afterwards + (times.first_validation - times.validation)
    return once + steps * times.step + validations * times.validation + saves * times.save + scored


def _too_short(run: Run, minutes: float, found: str, enough: float) -> UserError:
    """Return the error for minutes that are too short; a second call with this run uses what is prepared."""
    return UserError(
        f"train.minutes {minutes:g}: {found}. The prepared text is kept: give more minutes, --run "
        f"{shlex.quote(str(run.path))} --train.minutes {max(math.ceil(enough / 60), math.ceil(minutes))}, or a smaller "
        "model"
    )


def _measure(opened: OpenRun) -> Times:
    """Time steps, validations and a checkpoint on a state of their own."""
    config, mesh = opened.config, opened.mesh
    widest = sharding.shard_batch(mesh, opened.batches.empty_batch())
    vocab_size = opened.tokenizer.vocab_size
    start = time.perf_counter()
    resident = sharding.bytes_per_device(opened.state)
    fitted = memory.compile_to_fit(config, vocab_size, mesh, widest, resident)
    state = fitted.steps.init() if opened.state is None else opened.state
    jax.block_until_ready(state)
    mfu_baseline(config, vocab_size, mesh)  # measured again by `setup.compile_session`, as all of this is done again
    compilation = time.perf_counter() - start
    validate = make_validation(config, opened, fitted.steps)  # computes the reference of preferences, which steps need
    generate_samples = sampling_function(config, opened.run, opened.tokenizer, fitted.steps)
    if opened.state is not None:  # a step overwrites its state
        state = jax.tree.map(jnp.copy, opened.state)
    state, steps, more_compilation = _time_steps(opened, fitted, state, widest["input_ids"].shape)

    def validation() -> None:
        validate(state.evaluated_weights)
        generate_samples(state.evaluated_weights)

    first = call_time(validation)
    # The first process decides for all: the calls are collective, and each process has a clock of its own.
    is_repeated = agreement.from_first("second timed validation", lambda: first.total < _REPEATED_BELOW)
    later = call_time(validation).execution if is_repeated else first.execution
    save = _time_save(opened, state)
    score_tasks = TrainingTasks(opened.tasks, config, opened.run, opened.tokenizer, fitted.steps.model).score
    tasks = 0.0
    if opened.tasks:
        first_tasks = call_time(lambda: score_tasks(state.evaluated_weights))
        tasks = first_tasks.execution
        if agreement.from_first("second timed tasks", lambda: first_tasks.total < _REPEATED_BELOW):
            tasks = call_time(lambda: score_tasks(state.evaluated_weights)).execution
        compilation += max(0.0, first_tasks.total - tasks)
    compilation += more_compilation
    return Times(len(steps), statistics.fmean(steps), later, first.total, save, compilation, tasks)


def _time_steps(
    opened: OpenRun, fitted: memory.FittedStep, state: TrainState, shape: Any
) -> tuple[Any, list[float], float]:
    """Return the state after the timed steps, the seconds of each, and those of compiling for other shapes."""
    config, mesh = opened.config, opened.mesh
    part = sharding.batch_shard(mesh)
    programs = {shape: fitted.train}
    wanted = min(max(_SHARE * 60 * config.train.minutes, _MIN_SECONDS), _MAX_SECONDS)

    def count() -> int:
        mean = statistics.fmean(times)
        return max(len(times), math.ceil(min(max(wanted / mean, _MIN_STEPS), 3 * wanted / mean)))

    times: list[float] = []
    compilation = 0.0
    pending = None
    untimed = _UNTIMED_STEPS
    last = 0  # number of timed steps; 0: not known yet
    with Prefetcher(
        opened.batches, lambda batch: sharding.shard_batch(mesh, batch, part), 0, 1 << 30, part
    ) as prefetcher:
        end = time.perf_counter()
        while not last or len(times) < last:
            batch, _ = prefetcher.next()
            if batch["input_ids"].shape not in programs:
                start = time.perf_counter()
                programs[batch["input_ids"].shape] = fitted.steps.train.lower(state, batch).compile()
                compilation += time.perf_counter() - start
                untimed = max(untimed, 2)
            state, metrics = programs[batch["input_ids"].shape](state, batch)
            if pending is not None:  # as in the training loop, a step is dispatched before the one before is awaited
                jax.block_until_ready(pending)
            pending = metrics
            start, end = end, time.perf_counter()
            if untimed:
                untimed -= 1
            else:
                times.append(end - start)
            if len(times) == _FIRST_STEPS and not last:
                # All processes take the same number of steps. To agree takes time, so that the next step is not timed.
                last = agreement.from_first("steps of the speed trial", count)
                untimed += 1
    jax.block_until_ready(pending)
    return state, times, compilation


def _time_save(opened: OpenRun, state: TrainState) -> float:
    """Return the seconds of a checkpoint, saved to a folder of its own and removed."""
    folder = opened.run.path / f".trial{PARTIAL}"

    def save() -> None:
        with Checkpoints(folder, opened.config.checkpoint) as checkpoints:
            checkpoints.save(1, state.saved_fields(), opened.compatibility)
            checkpoints.wait()

    seconds = call_time(save).total
    agreement.gather("end of the trial's checkpoint", lambda: 0)
    if multihost.is_first():
        shutil.rmtree(folder, ignore_errors=True)
    return seconds
