"""Compile the training step so that it fits into memory, and reject a config that cannot fit before it runs.

XLA plans the memory of a compiled program to the byte. The plan is compared with the free memory of the device, so that
a run that cannot fit ends with a message before its first step, and is not killed by the operating system later.
"""

from dataclasses import dataclass
from typing import Any

import jax

from slm_jax.config.schema import Config
from slm_jax.distributed import agreement, sharding
from slm_jax.training.steps import Steps, make_steps
from slm_jax.utils.batch import Batch
from slm_jax.utils.errors import TrainingError
from slm_jax.utils.formatting import memory_size, plural
from slm_jax.utils.memory import free_host_memory

_USABLE_SHARE = 0.9  # of the free memory; the rest is for fragmentation, checkpoints in flight and other programs


@dataclass(frozen=True)
class FittedStep:
    """A training step that fits into memory.

    Attributes:
        config: The config with the microbatch that was chosen.
        steps: The functions of the run.
        train: `steps.train`, compiled.
        needed: Bytes of one device during a step; the largest of all processes.
        limit: Bytes of one device that a step may take; the smallest of all processes.
    """

    config: Config
    steps: Steps
    train: Any
    needed: int
    limit: int


def compile_to_fit(
    config: Config,
    vocab_size: int,
    mesh: jax.sharding.Mesh,
    batch: Batch,
    resident: int = 0,
    min_grad_accum_steps: int = 1,
) -> FittedStep:
    """Compile the training step for batches of the given shape.

    With `train.microbatch` "auto" the largest microbatch that fits is chosen, and gradients are accumulated over as
    many as the batch needs.

    Args:
        config: The run's config.
        vocab_size: Entries of the tokenizer's vocabulary.
        mesh: The devices.
        batch: A global batch on the devices.
        resident: Bytes of one device that the training state takes already.
        min_grad_accum_steps: Lower bound of the microbatches of a batch, if the microbatch is "auto".

    Raises:
        TrainingError: If the requested microbatch does not fit (names one that does), or if none does; without
            compiling where the training state alone does not.
    """
    limit = agreement.minimum("free memory", memory_limit(config, mesh) + resident)
    requested = config.train.microbatch
    candidates = _grad_accum_candidates(config, mesh.shape["data"] * mesh.shape["fsdp"])
    if requested == "auto":
        candidates = _at_least(min_grad_accum_steps, candidates)
    needed_first = 0
    while candidates:
        grad_accum_steps = candidates.pop(0)
        microbatch = config.train.batch_size // grad_accum_steps
        fitted = _compile(config, microbatch, vocab_size, mesh, batch, limit)
        needed_first = needed_first or fitted.needed
        if fitted.needed <= limit and requested in ("auto", microbatch):
            return fitted
        if fitted.needed <= limit:
            raise TrainingError(
                f"train.microbatch {requested} needs {memory_size(needed_first)} per step, but {memory_size(limit)} "
                f"are free: --train.microbatch {microbatch} fits ({memory_size(fitted.needed)}), auto would choose it"
            )
        # Memory shrinks no faster than the microbatch: candidates that cannot fit are not compiled.
        candidates = _at_least(int(0.9 * grad_accum_steps * fitted.needed / limit), candidates)
    raise TrainingError(
        f"a step of this model needs {memory_size(fitted.needed)} even with {plural(microbatch, 'sequence')} at once, "
        f"but {memory_size(limit)} are free: use --model.remat full, a shorter --train.sequence_length or a smaller "
        f"model"
    )


def _grad_accum_candidates(config: Config, batch_devices: int) -> list[int]:
    """Return the numbers of microbatches that divide the batch, from that of the config on, in ascending order."""
    batch_size = config.train.batch_size
    return [
        steps
        for steps in range(config.train.grad_accum_steps, batch_size + 1)
        if batch_size % steps == 0 and (batch_size // steps) % batch_devices == 0
    ]


def _at_least(lower_bound: int, candidates: list[int]) -> list[int]:
    """Return the candidates from a lower bound on; the last one if all are below it."""
    return [candidate for candidate in candidates if candidate >= lower_bound] or candidates[-1:]


def _compile(
    config: Config, microbatch: int, vocab_size: int, mesh: jax.sharding.Mesh, batch: Batch, limit: int
) -> FittedStep:
    """Compile the step with a microbatch, whether it fits or not.

    Raises:
        TrainingError: The training state alone does not fit.
    """
    train_config = config.train.model_copy(update={"microbatch": microbatch, "accumulation": 1})
    config = config.model_copy(update={"train": train_config})
    steps = make_steps(config, vocab_size, mesh)
    state = sharding.abstract_arrays(mesh, jax.eval_shape(steps.init), steps.partitions)
    _require_state(sharding.bytes_per_device(state), limit)
    try:
        train = steps.train.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # the TPU compiler rejects programs that do not fit
            raise
        train = None
    own = 2 * limit if train is None else needed_memory(train)
    needed = max(agreement.gather(f"memory of a step with microbatch {microbatch}", lambda: own))
    return FittedStep(config, steps, train, needed, limit)


def _require_state(needed: int, limit: int) -> None:
    """Refuse a training state that does not fit: a wide model is compiled for minutes before XLA knows what it needs.

    Args:
        needed: Bytes of one device that the state takes.
        limit: Bytes of one device that a step may take.

    Raises:
        TrainingError: It does not fit.
    """
    if needed > limit:
        raise TrainingError(
            f"the weights and the optimizer state of this model take {memory_size(needed)}, but {memory_size(limit)} "
            "are free: use a smaller --model.dim or --model.depth, or divide them over devices with --mesh.fsdp"
        )


def needed_memory(compiled: Any) -> int:
    """Return the bytes of one device that a compiled program takes while it runs; 0 if the backend has no plan."""
    plan = compiled.memory_analysis()
    if plan is None:
        return 0
    # Donated arguments share their memory with results: alias_size_in_bytes is in both sizes.
    arrays = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return int(arrays + plan.temp_size_in_bytes)


def memory_limit(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Return the bytes of one device that a step may take.

    Nine tenths of the free memory, and at most `train.memory_gb` if that is not 0.
    """
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        free = free_host_memory() // len(mesh.local_devices)
    else:
        stats = device.memory_stats() or {}
        free = stats.get("bytes_limit", 1 << 62) - stats.get("bytes_in_use", 0)
    usable = int(_USABLE_SHARE * free)
    allowed = int(config.train.memory_gb * 1e9)
    return min(usable, allowed) if allowed else usable


def describe(fitted: FittedStep, requested: Config) -> str:
    """Return one line on the memory of a step and on the microbatch that was chosen."""
    text = f"memory: {memory_size(fitted.needed)} per step, {memory_size(fitted.limit)} free"
    train = fitted.config.train
    if train.grad_accum_steps == requested.train.grad_accum_steps:
        return text
    microbatch = plural(int(train.microbatch), "sequence")
    return (
        f"{text}; {train.grad_accum_steps} microbatches of {microbatch} per step, as all {requested.train.batch_size} "
        "at once do not fit"
    )
