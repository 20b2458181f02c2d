"""The state of the training loop: created by `setup.compile_session`, used by `loop.run_loop`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from slm_jax.config.schema import Config
from slm_jax.data.batches.prefetch import TrainingBatches
from slm_jax.run.checkpoint import Checkpoints
from slm_jax.run.directory import Run
from slm_jax.run.metrics import Row
from slm_jax.run.trend import Trend
from slm_jax.training.train_step import TrainState
from slm_jax.utils.batch import Batch

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]


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
        validate: Returns the scores of parameters on the held-out text: `val_loss`, `val_perplexity`, `val_accuracy`,
            `val_bits_per_byte`; of a mixture also those of each source, see `validation.scores`.
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
    validate: Callable[[Any], Row]
    rise_text: Callable[[Trend, float | None], str]
    generate_samples: Callable[[Any], list[str]]
    score_tasks: Callable[[Any], Row]
    flops_per_token: Callable[[float | None], float]
    peak_flops: float
