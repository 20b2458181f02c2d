"""How the work of a step is split over devices, where XLA would not find it by itself.

The mesh is the one that the step is traced in (`train_step.make_steps`); without one, nothing is split. Its axes:
the rows of a batch are split over "data" and "fsdp", heads, inner widths and vocabulary over "tensor".
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

ROWS = ("data", "fsdp")
TENSOR = "tensor"

Split = tuple[str | None, str | None]
"""Which axis of the mesh each of the last two axes of an array is split over."""

_INWARD, _OUTWARD = ("fsdp", TENSOR), (TENSOR, "fsdp")
_MATRICES: dict[str, Split] = dict.fromkeys(("query", "key", "value", "gate", "up"), _INWARD)
_MATRICES |= dict.fromkeys(("out", "down", "embedding", "head"), _OUTWARD)


def split_of(path: tuple[Any, ...]) -> tuple[str, Split]:
    """(module, how its matrix is split) for the path of a parameter, or of a moment of one, in its tree; ("", …) where
    every device holds the whole."""
    for part in path:
        if (module := getattr(part, "key", None)) in _MATRICES:
            return module, _MATRICES[module]
    return "", (None, None)


def over_rows_and_heads(
    f: Callable[..., jax.Array], heads: tuple[jax.Array, ...], rows: tuple[jax.Array | None, ...]
) -> jax.Array:
    """f(*heads, *rows), float [B, T, H, K], each device computing its own rows and heads.

    heads: arrays [B, T, H or G, K]. rows: arrays [B, T], or None. For kernels, which XLA cannot split, and for code
    that merges the axes of rows and heads, which it would gather.
    """
    if not _axes(*ROWS, TENSOR):
        return f(*heads, *rows)
    by_head = PartitionSpec(ROWS, None, TENSOR)
    specs = (by_head,) * len(heads) + (PartitionSpec(ROWS),) * len(rows)
    # Gradients written by hand (custom_vjp) do not say what varies over devices, which is what would be checked.
    return jax.shard_map(f, in_specs=specs, out_specs=by_head, check_vma=False)(*heads, *rows)


def sum_over_rows(f: Callable[..., Any], *arguments: Any, whole: tuple[int, ...] = ()) -> Any:
    """f(*arguments), a sum over rows, with each device summing its own rows (axis 0) of every argument; the results are
    added up once. whole: the positions of arguments that have no rows. None stands for no argument."""
    axes = _axes(*ROWS)
    if not axes:
        return f(*arguments)
    specs = tuple(PartitionSpec() if i in whole else PartitionSpec(axes) for i in range(len(arguments)))

    def summed(*local: Any) -> Any:
        return jax.lax.psum(f(*local), axes)

    # Only over the axes of rows: a vocabulary split over "tensor" is left to XLA.
    return jax.shard_map(summed, in_specs=specs, out_specs=PartitionSpec(), axis_names=set(axes), check_vma=False)(
        *arguments
    )


def keep_rows_split(x_BxTxD: jax.Array) -> jax.Array:
    """The same array, held by rows: weights come to the activations and not the other way round."""
    if not _axes("fsdp", TENSOR):
        return x_BxTxD
    return jax.lax.with_sharding_constraint(x_BxTxD, PartitionSpec(ROWS))


def rows_of(table_VxD: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids], float [..., D]. The columns are put together first: the lookup would leave its result split by them,
    and neither it nor its gradient can be made one by rows but by way of the whole."""
    if _axes("fsdp"):
        table_VxD = jax.lax.with_sharding_constraint(table_VxD, PartitionSpec(TENSOR))
    return table_VxD[ids]


def layer_by_layer(f: Callable[[jax.Array], jax.Array], x_LxIxO: jax.Array, split: Split) -> jax.Array:
    """f(x) of a stack of matrices, each computed on its own and whole: the matrices are dealt out to all devices.
    Left to XLA, every device would compute all of them, or a part of each. split: how the stack is kept."""
    axes = _axes(*filter(None, split), "data")  # "data" last: what it splits is on every one of its devices already
    if not axes:
        return f(x_LxIxO)
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    more = -len(x_LxIxO) % devices
    x_NxIxO = jnp.pad(x_LxIxO, ((0, more), (0, 0), (0, 0)))
    # One axis at a time, each an exchange: asked for all at once, XLA would first put the whole stack together.
    ways = [
        PartitionSpec(axes[:n] or None, *(each if each in axes[n:] else None for each in split))
        for n in range(len(axes) + 1)
    ]
    for way in ways:
        x_NxIxO = jax.lax.with_sharding_constraint(x_NxIxO, way)
    y_NxIxO = f(x_NxIxO)
    for way in reversed(ways):
        y_NxIxO = jax.lax.with_sharding_constraint(y_NxIxO, way)
    return y_NxIxO[: len(x_LxIxO)]


def _axes(*names: str) -> tuple[str, ...]:
    """Those axes of the mesh in use that have more than one device."""
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(name for name in names if shape.get(name, 1) > 1)
