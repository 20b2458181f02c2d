"""The device mesh, and how batches and training state are distributed over it.

The step is written for the global batch and compiled by `jit` with shardings; XLA partitions it (GSPMD,
arXiv:2105.04663). The mesh has three axes of one or more devices:

data     splits the batch; every device holds the full training state
fsdp     splits the batch as well, and every matrix with its moments (ZeRO-3, arXiv:1910.02054); a layer's matrices are
         gathered where they are needed
tensor   splits attention heads, the inner width of the SwiGLU and the vocabulary (Megatron-LM, arXiv:1909.08053)
"""

import math
import os
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from slm_jax.config.checks import batch_devices_problem
from slm_jax.config.problem import any_of, multiples
from slm_jax.config.schema import Config
from slm_jax.distributed import multihost
from slm_jax.distributed.partitioning import BATCH_AXES, DATA, FSDP, TENSOR, Partitions, partition_of
from slm_jax.distributed.platform import Platform
from slm_jax.utils.errors import UserError

MESH_AXES = (DATA, FSDP, TENSOR)
_GPU_OPTIONS: dict[str, bool | int] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 8}


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of `mesh.data` x `mesh.fsdp` x `mesh.tensor` devices; `mesh.data` 0 takes all that are left.

    Args:
        config: The run's config.
        devices: Devices to use; None: all of JAX's.

    Raises:
        UserError: If devices, batch or processes do not divide as the mesh requires; names the nearest sizes that do.
    """
    if jax.process_count() != multihost.process_count():
        raise UserError(
            f"the {jax.process_count()} processes are not connected: call jax.distributed.initialize() first"
        )
    devices = jax.devices() if devices is None else devices
    available = len(devices)
    data, fsdp, tensor = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    wanted = max(data, 1) * fsdp * tensor
    if wanted > available:
        requested = " x ".join(f"{axis} {size}" for axis, size in config.mesh if size)
        present = f"there {'is' if available == 1 else 'are'} {available} ({devices[0].platform})"
        smaller = " ".join(f"--mesh.{axis} 1" for axis, size in config.mesh if size > 1)
        raise UserError(
            f"mesh asks for {wanted} devices ({requested}), {present}: use smaller sizes, such as {smaller}"
        )
    if not data and available % (fsdp * tensor):
        raise UserError(
            f"mesh.fsdp {fsdp} x mesh.tensor {tensor} does not divide the {available} devices: use a divisor of "
            f"{available}, or set --mesh.data"
        )
    sizes = (data or available // (fsdp * tensor), fsdp, tensor)
    batch_devices = sizes[0] * sizes[1]
    if (config.train.batch_size // config.train.grad_accum_steps) % batch_devices:
        raise UserError(batch_devices_problem(config.train, batch_devices))
    used = sizes[0] * sizes[1] * sizes[2]
    if jax.process_count() > 1 and used != available:
        raise UserError(
            f"mesh takes {used} of the {available} devices of {jax.process_count()} processes: it must take all"
        )
    return jax.make_mesh(sizes, MESH_AXES, devices=devices[:used], axis_types=(AxisType.Auto,) * 3)


def compiler_options(mesh: Mesh) -> dict[str, str | bool | int]:
    """Return the options of XLA that the programs of a run are compiled with for a mesh, in addition to the defaults.

    TPUs, products with a matrix that is split over "fsdp": by default, the compiler passes the parts of the matrix
    around while it multiplies ("windowed einsum"), and reads and writes the float32 result in memory once for each part
    (`tpu_v5e_8`: 111 GB of traffic in a step of 8 x 1,024 tokens per chip, in place of 90). With a threshold that no
    product reaches, a layer's matrices are gathered, and their gradients reduce-scattered, at once.

    GPUs: by default, the compiler generates dozens of Triton kernels for each product and times them against those of
    cuBLAS, which takes more than half of the compilation and gains nothing for large products (configs/README.md).
    It also merges products of one operand (queries, keys and values) of at most 32 MB, and copies the parts of the
    result: 13 % of the traffic of `gpu_125m` with 8 x 1,024 tokens (compiled, not run). Below 8 MB, an estimate,
    merging stays, because it saves the launch of a kernel. Options set in XLA_FLAGS take precedence.
    """
    platform = Platform.of_mesh(mesh).name
    if platform == "tpu" and mesh.shape[FSDP] > 1:
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    if platform == "gpu":
        return {name: value for name, value in _GPU_OPTIONS.items() if name not in os.environ.get("XLA_FLAGS", "")}
    return {}


def batch_shard(mesh: Mesh) -> tuple[int, int]:
    """Return the shard of each global batch that this process loads for its own devices.

    Returns:
        (index, count): the shard is number `index` of `count` equal, contiguous shards of the batch axis. (0, 1), the
        full batch, if the process's devices do not hold a contiguous shard.
    """
    devices_by_slice = mesh.devices.reshape(mesh.shape[DATA] * mesh.shape[FSDP], -1)
    process = jax.process_index()
    own = [i for i, devices in enumerate(devices_by_slice) if any(d.process_index == process for d in devices)]
    is_contiguous = own == list(range(own[0], own[-1] + 1))
    is_aligned = len(devices_by_slice) % len(own) == 0 and own[0] % len(own) == 0
    if is_contiguous and is_aligned:
        return own[0] // len(own), len(devices_by_slice) // len(own)
    return 0, 1


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray], shard: tuple[int, int] = (0, 1)) -> dict[str, jax.Array]:
    """Return the global batch on the devices, split over "data" and "fsdp".

    Args:
        mesh: The mesh.
        batch: Arrays [B, …], or the shard of them that this process has loaded.
        shard: (index, count) of that shard, see `batch_shard`; ignored with one process.

    Returns:
        Global arrays [B, …].
    """
    by_batch = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    if jax.process_count() == 1:
        return jax.device_put(batch, by_batch)
    index, count = shard

    def put(local: np.ndarray) -> jax.Array:
        first = index * len(local)
        global_shape = (count * len(local), *local.shape[1:])

        def slice_for_device(at: Any) -> np.ndarray:
            start, stop, _ = at[0].indices(global_shape[0])
            return local[start - first : stop - first]

        return jax.make_array_from_callback(global_shape, by_batch, slice_for_device)

    return {name: put(array) for name, array in batch.items()}


def is_replicated(tree: Any) -> bool:
    """Return whether every device of the mesh holds all arrays of a tree in full."""
    return all(x.is_fully_replicated for x in jax.tree.leaves(tree))


def local_replica(tree: Any) -> Any:
    """Return the arrays of a replicated tree as those of the first device of this process; nothing is copied."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def mesh_of(tree: Any) -> Mesh | None:
    """Return the mesh that the arrays of a tree are split over; None if one device holds them."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return cast("Mesh", sharding.mesh)
    return None


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, tree: Any, partitions: Partitions) -> Any:
    """Return the sharding of each leaf of a training state or a part of it.

    Args:
        mesh: The mesh.
        tree: Arrays, or their shapes and dtypes.
        partitions: Declared partitions, `Steps.partitions`.

    Raises:
        UserError: If an axis does not divide over the devices that it is split over.
        ValueError: If nothing declares the partition of a leaf.
    """

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        partition = partition_of(path, leaf, partitions)
        for size, axis in zip(leaf.shape, partition, strict=bool(partition)):
            if axis and size % mesh.shape[axis]:
                raise UserError(_indivisible(_module_name(path), size, axis, mesh.shape[axis]))
        return NamedSharding(mesh, PartitionSpec(*partition))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def abstract_arrays(mesh: Mesh, tree: Any, partitions: Partitions) -> Any:
    """Return the shape, dtype and sharding of each leaf of a training state: what a checkpoint is restored to.

    Args and Raises as in `tree_shardings`.
    """
    shardings = tree_shardings(mesh, tree, partitions)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _module_name(path: tuple[Any, ...]) -> str:
    """Return the name of the module that a parameter or a moment belongs to, `query` or `embedding`."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return names[-2] if names[-1] == "weight" else names[-1]


def _indivisible(module: str, size: int, axis: str, devices: int) -> str:
    problem = f"the {size} rows or columns of {module} do not divide over mesh.{axis} {devices}"
    if axis == TENSOR and module in ("embedding", "head"):
        return f"{problem}: pad the vocabulary with --model.vocab_multiple {devices}"
    if axis == TENSOR and module in ("gate", "up", "down"):
        return f"{problem}: use --model.mlp_multiple {devices} or a multiple of it"
    return f"{problem}: use {any_of(multiples(size, devices))}, or another --mesh.{axis}"


def describe(mesh: Mesh) -> str:
    """Return the devices as text: `8 x NVIDIA H100 (fsdp 8)`."""
    device = mesh.devices.flat[0]
    text = f"{mesh.size} x CPU" if device.platform == "cpu" else f"{mesh.size} x {device.device_kind}"
    split = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    if not split or split == [f"{DATA} {mesh.size}"]:
        return text
    return f"{text} ({' x '.join(split)})"


def bytes_per_device(tree: Any) -> int:
    """Return the bytes that the arrays of a tree, which may be abstract, take on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
