"""The real training step, compiled for described devices.

The step is that of `make_steps`, with the mesh of the described devices, so that the same kernels are chosen as on
them. GPU programs are compiled without autotuning, for which a GPU has to be present: a chip may choose other tiles for
its products, with other scratch memory.
"""

import contextlib
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from slm_jax.config.schema import Config
from slm_jax.data.batches.modes import empty_batch
from slm_jax.distributed import sharding
from slm_jax.distributed.partitioning import BATCH_AXES
from slm_jax.planning import hlo
from slm_jax.planning.collectives import Collective, find_collectives
from slm_jax.planning.cudnn import described_gpu
from slm_jax.planning.targets import Target
from slm_jax.planning.traffic import traffic_bytes
from slm_jax.training import memory
from slm_jax.training.steps import make_steps

_OPTIONS = {"gpu": {"xla_gpu_autotune_level": "0"}, "tpu": {}}  # autotuning measures kernels on a GPU
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Program(NamedTuple):
    """A training step compiled for described devices; all figures are of one device.

    Attributes:
        rows: Sequences computed at once.
        grad_accum_steps: Microbatches of a step.
        state_bytes: Memory of the training state, as the compiler lays it out.
        batch_bytes: Memory of the batch.
        temp_bytes: Temporary memory: activations, gradients and intermediate results of the optimizer.
        needed_bytes: State, batch and temporary memory together.
        compiler_flops: FLOPs of a step as the compiler counts them (those of its kernels are not included); None if it
            reports none.
        bytes_accessed: Bytes that a step reads and writes as the compiler counts them (a loop's body once, a TPU's
            vector memory included); None if it reports none.
        traffic_bytes: Bytes that a step reads from and writes to the device's memory (traffic.py).
        collectives: Communication of a step.
        kernels: Targets of the program's custom calls, such as cuDNN's attention.
        compile_seconds: Time to compile, tracing included.
        hlo: The compiled program as text; "" of one that the compiler refused, because it needs too much memory: no
            figures but those of memory are known then.
    """

    rows: int
    grad_accum_steps: int
    state_bytes: int
    batch_bytes: int
    temp_bytes: int
    needed_bytes: int
    compiler_flops: float | None
    bytes_accessed: float | None
    traffic_bytes: int
    collectives: tuple[Collective, ...]
    kernels: tuple[str, ...]
    compile_seconds: float
    hlo: str


def split_batch(config: Config, rows: int, batch_devices: int) -> Config:
    """Return the config with a microbatch of `rows` sequences on each device."""
    train = config.train.model_copy(update={"microbatch": rows * batch_devices, "accumulation": 1})
    return config.model_copy(update={"train": train})


def compile_program(config: Config, vocab_size: int, target: Target, devices: Sequence[Any], rows: int) -> Program:
    """Compile the training step of a config.

    Args:
        config: The config.
        vocab_size: Entries of the tokenizer's vocabulary.
        target: The kind of device.
        devices: Compile-only devices, from `describe_devices`.
        rows: Sequences that each device computes at once.

    Returns:
        The program. If a TPU's compiler rejects it because it does not fit, only the memory that it states is known.

    Raises:
        UserError: If model or batch do not divide over the devices.
    """
    start = time.perf_counter()
    mesh = sharding.make_mesh(config, devices)
    batch_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    config = split_batch(config, rows, batch_devices)
    steps = make_steps(config, vocab_size, mesh)
    state = sharding.abstract_arrays(mesh, jax.eval_shape(steps.init), steps.partitions)
    by_batch = jax.NamedSharding(mesh, jax.P(BATCH_AXES))
    arrays = empty_batch(config)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_batch) for name, x in arrays.items()}
    batch_bytes = sum(x.nbytes for x in arrays.values()) // batch_devices
    gpu = target.gpu
    with described_gpu(gpu.capability) if gpu else contextlib.nullcontext():
        lowered = steps.train.lower(state, batch)
    try:
        compiled = lowered.compile(compiler_options=_OPTIONS[target.kind])
    except jax.errors.JaxRuntimeError as error:
        state_bytes = _shard_bytes(state)
        needed = _stated_need(str(error), state_bytes + batch_bytes)
        if needed is None:
            raise
        seconds = time.perf_counter() - start
        temp_bytes = max(needed - state_bytes - batch_bytes, 0)
        unknown = (state_bytes, batch_bytes, temp_bytes, needed, None, None, 0, (), (), seconds, "")
        return Program(rows, config.train.grad_accum_steps, *unknown)
    seconds = time.perf_counter() - start
    plan = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    text = compiled.as_text()
    module = hlo.parse(text)
    return Program(
        rows=rows,
        grad_accum_steps=config.train.grad_accum_steps,
        state_bytes=plan.argument_size_in_bytes - batch_bytes,
        batch_bytes=batch_bytes,
        temp_bytes=plan.temp_size_in_bytes,
        needed_bytes=memory.needed_memory(compiled),
        compiler_flops=costs.get("flops"),
        bytes_accessed=costs.get("bytes accessed"),
        traffic_bytes=traffic_bytes(module),
        collectives=tuple(find_collectives(module)),
        kernels=tuple(sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))),
        compile_seconds=seconds,
        hlo=text,
    )


def _stated_need(message: str, arguments: int) -> int | None:
    """Return the bytes of a program that a TPU's compiler rejects because it does not fit, or None for other messages.

    Args:
        message: The compiler's message, which states the memory of the whole program or that of temporary arrays.
        arguments: Bytes of state and batch.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    if whole := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message):
        return int(float(whole[1]) * _UNITS[whole[2]])
    if temporary := re.search(r"required for [^(]*\(([\d.]+)([KMGT])\) exceeds available HBM", message):
        return arguments + int(float(temporary[1]) * _UNITS[temporary[2]])
    return None


def _shard_bytes(tree: Any) -> int:
    """Return the bytes of one device's part of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(
        jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype).size * leaf.dtype.itemsize
        for leaf in leaves
    )
