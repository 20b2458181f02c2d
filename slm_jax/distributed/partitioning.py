"""Mesh axes, the partition of each array, and explicit partitioning where XLA would choose a slow one.

A partition is declared where a parameter is created, `nnx.Param(value, partition=(FSDP, TENSOR))`; gradients and
optimizer moments follow the parameter that they belong to (`partition_of`). An array that nothing declares is an
error: silently replicated, it would cost every device its full size.

The functions below act on the mesh that the step is traced in (`steps.make_steps`); without one they do nothing.

Shapes: B batch, T tokens, D dim, H query heads, G key/value heads, K channels of a head, V vocabulary, L layers, I and
O the input and output axes of a matrix, N layers padded to a multiple of the devices.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

DATA = "data"
FSDP = "fsdp"
TENSOR = "tensor"
BATCH_AXES = (DATA, FSDP)
"""Mesh axes that the batch axis of activations is split over."""

Partition = tuple[str | None, ...]
"""Mesh axis that each axis of an array is split over (None: not split); () for a replicated array."""

REPLICATED: Partition = ()

Partitions = Mapping[tuple[str, ...], Partition]
"""Declared partitions by path, {("blocks", "attention", "query", "weight"): (None, "fsdp", "tensor"), …}."""


def partition_of(path: tuple[Any, ...], leaf: Any, partitions: Partitions) -> Partition:
    """Return the partition of a leaf of a training state, of its parameters or of its optimizer state.

    The state of an optimizer repeats the tree of the parameters below a path of its own, so that the declared path is
    a suffix of the leaf's. Scalars cannot be split and need no declaration.

    Args:
        path: Key path of the leaf, as `jax.tree_util` gives it.
        leaf: An array or its shape and dtype.
        partitions: Declared partitions.

    Raises:
        ValueError: If no declared path is a suffix of the leaf's.
    """
    if leaf.ndim == 0:
        return REPLICATED
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    for start in range(len(names)):
        if names[start:] in partitions:
            return partitions[names[start:]]
    raise ValueError(
        f"no partition is declared for {'.'.join(names)} {list(leaf.shape)}: create the parameter as "
        f"nnx.Param(value, partition=(…)), an axis of the mesh or None for each of its axes, () to replicate it"
    )


def map_over_batch_and_heads(
    f: Callable[..., jax.Array], by_head: tuple[jax.Array, ...], by_sequence: tuple[jax.Array | None, ...]
) -> jax.Array:
    """Return `f(*by_head, *by_sequence)` with each device computing its own sequences and heads.

    For kernels, which XLA cannot partition, and for code that merges the batch and head axes, which XLA would gather.

    Args:
        f: Function whose result is float [B, T, H, K].
        by_head: Arrays [B, T, H or G, K].
        by_sequence: Arrays [B, T], or None.
    """
    if not _split_axes(*BATCH_AXES, TENSOR):
        return f(*by_head, *by_sequence)
    head_spec = PartitionSpec(BATCH_AXES, None, TENSOR)
    specs = (head_spec,) * len(by_head) + (PartitionSpec(BATCH_AXES),) * len(by_sequence)
    # check_vma verifies which values vary over devices; handwritten gradients (custom_vjp) do not declare it.
    return jax.shard_map(f, in_specs=specs, out_specs=head_spec, check_vma=False)(*by_head, *by_sequence)


def sum_over_batch(f: Callable[..., Any], *args: Any, replicated: tuple[int, ...] = ()) -> Any:
    """Return `f(*args)`, a sum over the batch, with each device summing its own part and one all-reduce at the end.

    Args:
        f: Function that sums over axis 0 of its arguments.
        *args: Arrays or trees of arrays; None for an argument that is absent.
        replicated: Positions of arguments without a batch axis.
    """
    axes = _split_axes(*BATCH_AXES)
    if not axes:
        return f(*args)
    specs = tuple(PartitionSpec() if i in replicated else PartitionSpec(axes) for i in range(len(args)))

    def local_sum(*local: Any) -> Any:
        return jax.lax.psum(f(*local), axes)

    # Manual over the batch axes only: XLA still partitions a vocabulary that is split over "tensor".
    mapped = jax.shard_map(local_sum, in_specs=specs, out_specs=PartitionSpec(), axis_names=set(axes), check_vma=False)
    return mapped(*args)


def shard_by_batch(x_BxTxD: jax.Array) -> jax.Array:
    """Return x constrained to be split by batch only, so that weights are gathered and not activations."""
    if not _split_axes(FSDP, TENSOR):
        return x_BxTxD
    return _constrain(x_BxTxD, PartitionSpec(BATCH_AXES))


def embedding_lookup(table_VxD: jax.Array, ids: jax.Array) -> jax.Array:
    """Return table[ids], float [..., D].

    The table's columns are gathered first: a lookup in a table split by columns gives a result split by columns, and
    XLA reshards that result, and its gradient, to the batch only by way of the full array.
    """
    if _split_axes(FSDP):
        table_VxD = _constrain(table_VxD, PartitionSpec(TENSOR))
    return table_VxD[ids]


def map_matrices(f: Callable[[jax.Array], jax.Array], x_LxIxO: jax.Array, partition: Partition) -> jax.Array:
    """Return f(x) of a stack of matrices, with complete matrices distributed over all devices.

    f treats each matrix on its own and needs all of it (Newton-Schulz in Muon). Left to XLA, every device would
    compute all matrices, or a part of each with communication in every product.

    Args:
        f: Function from [N, I, O] to [N, I, O].
        x_LxIxO: Stack of matrices.
        partition: Partition of the stack, which the result has too.
    """
    split = tuple(partition[-2:])
    # "data" comes last: what it splits is on every one of its devices already.
    axes = _split_axes(*filter(None, split), DATA)
    if not axes:
        return f(x_LxIxO)
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    padding = -len(x_LxIxO) % devices
    x_NxIxO = jnp.pad(x_LxIxO, ((0, padding), (0, 0), (0, 0)))
    # Move one mesh axis at a time from the matrix axes to the layer axis, each move an all-to-all. Given one constraint
    # for all of them, XLA would first gather the full stack.
    stages = [
        PartitionSpec(axes[:moved] or None, *(axis if axis in axes[moved:] else None for axis in split))
        for moved in range(len(axes) + 1)
    ]
    for stage in stages:
        x_NxIxO = _constrain(x_NxIxO, stage)
    y_NxIxO = f(x_NxIxO)
    for stage in reversed(stages):
        y_NxIxO = _constrain(y_NxIxO, stage)
    return y_NxIxO[: len(x_LxIxO)]


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return x constrained to a partition over the current mesh."""
    # jax 0.7.2 does not look the mesh up for a bare specification.
    return jax.lax.with_sharding_constraint(x, NamedSharding(jax.sharding.get_abstract_mesh(), spec))


def _split_axes(*names: str) -> tuple[str, ...]:
    """Return those of the named axes that have more than one device in the current mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(name for name in names if shape.get(name, 1) > 1)
