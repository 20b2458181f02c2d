"""Whether a training step fits into memory, known before it runs; and how much of the batch to compute at once.

XLA plans a compiled program's memory to the byte. That plan is compared with what the device has, so that a run that
cannot fit ends with a sentence before its first step, and not with the operating system's killer in its middle.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from slm_jax.config.schema import Config
from slm_jax.distributed import multihost, sharding
from slm_jax.training.train_step import Steps, make_steps
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import memory_size, plural

_SHARE = 0.9  # of what is free: the rest is for fragmentation, checkpoints in flight and other programs


@dataclass(frozen=True)
class Fitted:
    """A step that fits."""

    config: Config  # with the microbatch that was found
    steps: Steps
    train: Any  # steps.train, compiled
    needed: int  # bytes of one device during a step
    limit: int  # bytes that it may take


def compile_to_fit(
    config: Config,
    vocab_size: int,
    mesh: jax.sharding.Mesh,
    batch: dict[str, jax.Array],
    resident: int = 0,
    least_parts: int = 1,
) -> Fitted:
    """The run's step, compiled for batches like this one.

    With `train.microbatch` "auto" the largest part of the batch that fits is computed at once, the rest accumulated,
    in least_parts parts or more. resident: bytes of one device that the training state holds already.

    Raises UserError if the microbatch that was asked for does not fit, naming one that does, or if none does.
    """
    limit = multihost.minimum(memory_limit(config, mesh)) + resident
    asked, first = config.train.microbatch, 0
    divisions = list(_divisions(config, mesh.shape["data"] * mesh.shape["fsdp"]))
    if asked == "auto":
        divisions = [parts for parts in divisions if parts >= least_parts] or divisions[-1:]
    while divisions:
        parts = divisions.pop(0)
        rows = config.train.batch_size // parts
        fitted = _compiled(config, rows, vocab_size, mesh, batch, limit)
        first = first or fitted.needed
        if fitted.needed <= limit and asked in ("auto", rows):
            return fitted
        if fitted.needed <= limit:
            raise UserError(
                f"train.microbatch {asked} needs {memory_size(first)} a step, but there are {memory_size(limit)}: "
                f"--train.microbatch {rows} fits ({memory_size(fitted.needed)}), auto would find it"
            )
        # What a part needs shrinks no faster than the part, so that some need not be tried.
        least_parts = int(0.9 * parts * fitted.needed / limit)
        divisions = [parts for parts in divisions if parts >= least_parts] or divisions[-1:]
    raise UserError(
        f"a step of this model needs {memory_size(fitted.needed)} even with {plural(rows, 'sequence')} at once, but "
        f"there are {memory_size(limit)}: use --model.remat full, a shorter --train.sequence_length or a smaller model"
    )


def _divisions(config: Config, devices: int) -> Iterator[int]:
    """The numbers of equal parts that the batch may be cut into, from as many as the config says."""
    batch = config.train.batch_size
    for parts in range(config.train.grad_accum_steps, batch + 1):
        if batch % parts == 0 and (batch // parts) % devices == 0:
            yield parts


def _compiled(
    config: Config, rows: int, vocab_size: int, mesh: jax.sharding.Mesh, batch: dict[str, jax.Array], limit: int
) -> Fitted:
    train_config = config.train.model_copy(update={"microbatch": rows, "accumulation": 1})
    config = config.model_copy(update={"train": train_config})
    steps = make_steps(config, vocab_size, mesh)
    shapes = jax.eval_shape(steps.init)
    state = sharding.abstract_arrays(shapes, sharding.tree_shardings(mesh, shapes))
    try:
        train = steps.train.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # TPUs find out while compiling
            raise
        return Fitted(config, steps, None, 2 * limit, limit)
    return Fitted(config, steps, train, needed_memory(train), limit)


def needed_memory(compiled: Any) -> int:
    """Bytes of one device that a compiled program takes while it runs; 0 where the backend does not tell."""
    plan = compiled.memory_analysis()
    if plan is None:
        return 0
    kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return int(kept + plan.temp_size_in_bytes)


def memory_limit(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Bytes of one device that a step may take: what is free, and no more than `train.memory_gb` (if that is not 0)."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        free = _free_host_memory() // len(mesh.local_devices)
    else:
        stats = device.memory_stats() or {}
        free = stats.get("bytes_limit", 1 << 62) - stats.get("bytes_in_use", 0)
    allowed = int(config.train.memory_gb * 1e9)
    return min(int(_SHARE * free), allowed) if allowed else int(_SHARE * free)


def _free_host_memory() -> int:
    """Bytes that this process could still take, within its container's limit."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = ((Path("/sys/fs/cgroup") / name).read_text().strip() for name in (limit, used))
        except OSError:
            continue
        if most.isdigit():
            free = min(free, int(most) - int(now))
    return max(free, 1)


def describe(fitted: Fitted, asked: Config) -> str:
    """One line on what a step takes, and on what was decided."""
    text = f"memory: {memory_size(fitted.needed)} for a step, {memory_size(fitted.limit)} free"
    if fitted.config.train.grad_accum_steps != asked.train.grad_accum_steps:
        text += (
            f"; {fitted.config.train.microbatch} sequences at once, "
            f"{fitted.config.train.grad_accum_steps} times a step, as all {asked.train.batch_size} do not fit"
        )
    return text
