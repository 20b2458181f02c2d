"""How the work of a step is split over devices, where XLA would not find it by itself.

The mesh is the one that the step is traced in (`train_step.make_steps`); without one, nothing is split. Its axes:
the rows of a batch are split over "data" and "fsdp", heads, inner widths and vocabulary over "tensor".
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

ROWS = ("data", "fsdp")
TENSOR = "tensor"


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


def split_layers(x_Lx: jax.Array) -> jax.Array:
    """The same stack, its layers dealt out to as many devices as divide them, each layer whole: for what is computed
    layer by layer and would otherwise be repeated on every device."""
    axes: tuple[str, ...] = ()
    shape = jax.sharding.get_abstract_mesh().shape
    size = 1
    for axis in _axes(*ROWS, TENSOR):
        if x_Lx.shape[0] % (size * shape[axis]) == 0:
            axes, size = (*axes, axis), size * shape[axis]
    if not _axes("fsdp", TENSOR):
        return x_Lx
    return jax.lax.with_sharding_constraint(x_Lx, PartitionSpec(axes or None))


def _axes(*names: str) -> tuple[str, ...]:
    """Those axes of the mesh in use that have more than one device."""
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(name for name in names if shape.get(name, 1) > 1)
