"""Devices: one mesh, and where batches and state live on it.

`jit` with shardings is what `pmap` became: the step is written for the global batch, XLA splits it over the mesh.
Three axes, each of one or more devices (arXiv:2105.04663 describes the method):

data     the batch's rows; every device holds all of the training state
fsdp     the batch's rows as well; each device holds its part of every matrix and of its moments (ZeRO-3,
         arXiv:1910.02054), which are put together layer by layer where they are needed
tensor   attention heads, the SwiGLU's inner width and the vocabulary (Megatron, arXiv:1909.08053)
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from slm_jax.config.checks import any_of, batch_devices_problem, multiples
from slm_jax.config.schema import Config
from slm_jax.distributed.partitioning import ROWS, TENSOR, split_of
from slm_jax.utils.errors import UserError

AXES = (*ROWS, TENSOR)


def make_mesh(config: Config) -> Mesh:
    """The mesh of `mesh.data` x `mesh.fsdp` x `mesh.tensor` devices (data 0: as many as there are). Raises UserError,
    with the nearest numbers that would do, if devices, batch or model do not divide."""
    available, m = jax.device_count(), config.mesh
    each = m.fsdp * m.tensor
    if (wanted := max(m.data, 1) * each) > available:
        asked = " x ".join(f"{axis} {size}" for axis, size in m if size)
        raise UserError(
            f"mesh asks for {wanted} devices ({asked}), there are {available} ({jax.default_backend()}): give others"
        )
    if not m.data and available % each:
        raise UserError(
            f"mesh.fsdp {m.fsdp} x mesh.tensor {m.tensor} does not divide the {available} devices: use a divisor of "
            f"{available}, or say how many --mesh.data to use"
        )
    sizes = (m.data or available // each, m.fsdp, m.tensor)
    rows, train = sizes[0] * sizes[1], config.train
    if (train.batch_size // train.grad_accum_steps) % rows:
        raise UserError(batch_devices_problem(train, rows))
    count = int(np.prod(sizes))
    if jax.process_count() > 1 and count != available:
        raise UserError(f"mesh takes {count} of the {available} devices of {jax.process_count()} processes: take all")
    return jax.make_mesh(sizes, AXES, devices=jax.devices()[:count], axis_types=(AxisType.Auto,) * 3)


def batch_shard(mesh: Mesh) -> tuple[int, int]:
    """(host, hosts): this process needs the host-th of `hosts` equal parts of a batch's rows for its own devices."""
    index = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    mine = [row for row, devices in enumerate(index) if any(d.process_index == jax.process_index() for d in devices)]
    together = mine == list(range(mine[0], mine[-1] + 1)) and len(index) % len(mine) == 0 and mine[0] % len(mine) == 0
    return (mine[0] // len(mine), len(index) // len(mine)) if together else (0, 1)


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray], part: tuple[int, int] = (0, 1)) -> dict[str, jax.Array]:
    """The global batch on the devices, its rows split over "data" and "fsdp". part: which of how many parts of the
    rows `batch` is, all that this process needs (see `batch_shard`)."""
    rows = NamedSharding(mesh, PartitionSpec(ROWS))
    if jax.process_count() == 1:
        return jax.device_put(batch, rows)
    host, hosts = part

    def put(local: np.ndarray) -> jax.Array:
        first, shape = host * len(local), (hosts * len(local), *local.shape[1:])

        def cut(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return local[start - first : stop - first]

        return jax.make_array_from_callback(shape, rows, cut)

    return {name: put(array) for name, array in batch.items()}


def gather_to_one_device(mesh: Mesh, tree: Any) -> Any:
    """The whole of a tree that the mesh holds, on the first device of each process. All processes take part."""
    if not all(x.is_fully_replicated for x in jax.tree.leaves(tree)):
        tree = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each leaf of a training state or of its parameters (arrays, or shapes and dtypes).

    A matrix and its moments are split alike. Raises UserError if a matrix does not divide.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        module, split = split_of(path)
        if not module or leaf.ndim < 2:
            return replicated(mesh)
        for size, axis in zip(leaf.shape[-2:], split, strict=True):
            if axis and size % mesh.shape[axis]:
                raise UserError(_indivisible(module, size, axis, mesh.shape[axis]))
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 2), *split))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def _indivisible(module: str, size: int, axis: str, devices: int) -> str:
    found = f"the {size} rows or columns of {module} do not divide over mesh.{axis} {devices}"
    if axis == TENSOR and module in ("embedding", "head"):
        return f"{found}: pad the vocabulary with --model.vocab_multiple {devices}"
    if axis == TENSOR and module in ("gate", "up", "down"):
        return f"{found}: use --model.mlp_multiple {devices} or a multiple of it"
    return f"{found}: use {any_of(multiples(size, devices))}, or another --mesh.{axis}"


def describe(mesh: Mesh) -> str:
    """The devices in words."""
    device = mesh.devices.flat[0]
    text = f"{mesh.size} x {device.device_kind}" if device.platform != "cpu" else f"{mesh.size} x CPU"
    split = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    return text + (f" ({' x '.join(split)})" if split and split != [f"data {mesh.size}"] else "")


def abstract_arrays(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree, each with the sharding it is to have."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def bytes_per_device(tree: Any) -> int:
    """What the arrays of a tree take of each device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
