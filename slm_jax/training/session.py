"""The state of the training loop: created by `setup.compile_session`, used by `loop.run_loop`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from slm_jax.config.schema import Config
from slm_jax.data.batches.prefetch import TrainingBatches
from slm_jax.run.checkpoint import Checkpoints
from slm_jax.run.directory import Run
from slm_jax.run.metrics import Row, RowLogger
from slm_jax.run.trend import Trend
from slm_jax.training.train_step import TrainState
from slm_jax.utils.batch import Batch

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
RunStep = Callable[[int, TrainStep, TrainState, Batch], tuple[TrainState, dict[str, Any]]]
"""Function of the number of a step, from 1, and the compiled step with its arguments, which it calls."""


@contextlib.contextmanager
def plain_steps() -> Iterator[RunStep]:
    """Yield the call of a step, and nothing else."""
    yield lambda step, train_step, state, batch: train_step(state, batch)


@dataclass(frozen=True)
class Session:
    """A run that is ready for its next step.

    Attributes:
        config: The config, with the microbatch size that fits into memory.
        run: The run directory.
        checkpoints: The checkpoints of the run.
        compatibility: Stored with each checkpoint and checked on resume, see `resume.compatibility`.
        trend: The validations before this call; stored with each checkpoint as well.
        start: The number of steps taken before this call.
        state: The training state after these steps; the first step donates its arrays.
        batches: The training batches.
        shard_batch: Puts this process's part of a batch onto its devices.
        batch_part: This process's part of each batch: (index, number of parts).
        programs: Compiled training steps by the shape [B, T] of their batches; at first only the widest.
        compile_step: Compiles the training step for batches like an example, which the loop does for further shapes
            (padded batches have a few widths).
        open_loggers: Opens the further destinations of the rows, `log.sinks`; for the first process.
        running_steps: Context in which the steps run, and the function that runs one: `plain_steps`, or with traces and
            NaN debugging (`jax_debug_nans`), `options.profiler.traced_steps`.
        check_row: Checks the metrics of a step before they are written, and raises a TrainingError if training has
            diverged. Returns the row.
        layers_row: Returns the row of `layers.jsonl` from a step and its metric "layers".
        validate: Returns the scores of parameters on the held-out text: `val_loss`, `val_perplexity`, `val_accuracy`,
            `val_bits_per_byte`; of a mixture also those of each source, see `validation.scores`.
        score_name: The score that checkpoints are chosen by.
        rise_text: Returns the warning about a trend that has risen, given the newest training loss.
        generate_samples: Returns a text for each prompt of `eval.prompts`, see `sample_texts`; empty on processes other
            than the first, or if no samples are wanted.
        score_tasks: Returns the scores of `eval.tasks`, see `tasks.TrainingTasks`; the same in all processes.
        flops_per_token: Returns the model FLOPs of training on one input token, given the keys that it attends to on
            average (None: those of a full window).
        peak_flops: FLOP/s that the MFU is relative to.
    """

    config: Config
    run: Run
    checkpoints: Checkpoints
    compatibility: dict[str, Any]
    trend: Trend
    start: int
    state: TrainState
    batches: TrainingBatches
    shard_batch: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]
    batch_part: tuple[int, int]
    programs: dict[tuple[int, ...], TrainStep]
    compile_step: Callable[[TrainState, Batch], TrainStep]
    open_loggers: Callable[[], Sequence[RowLogger]]
    running_steps: Callable[[], contextlib.AbstractContextManager[RunStep]]
    check_row: Callable[[Row], Row]
    layers_row: Callable[[int, Any], Row]
    validate: Callable[[Any], Row]
    score_name: str
    rise_text: Callable[[Trend, float | None], str]
    generate_samples: Callable[[Any], list[str]]
    score_tasks: Callable[[Any], Row]
    flops_per_token: Callable[[float | None], float]
    peak_flops: float
