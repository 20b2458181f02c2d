"""What XLA cannot split over devices by itself, or would split badly, is mapped over the mesh here.

The mesh is the one that the step is traced in (`train_step.make_steps`); without one, nothing is mapped.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

_BATCH = "data"  # the axis that the rows of a batch are split over


def over_rows(f: Callable[..., Any], *arguments: Any, whole: tuple[int, ...] = ()) -> Any:
    """f(*arguments) with each device computing its own rows (axis 0) of every argument and of the result.

    whole: the positions of arguments that every device gets whole. None stands for no argument.
    """
    return _mapped(f, arguments, whole, PartitionSpec(_BATCH))


def sum_over_rows(f: Callable[..., Any], *arguments: Any, whole: tuple[int, ...] = ()) -> Any:
    """As `over_rows`, for an f whose result is a sum over rows: the devices' results are added up, once."""
    if not _split():
        return f(*arguments)
    return _mapped(lambda *local: jax.lax.psum(f(*local), _BATCH), arguments, whole, PartitionSpec())


def _split() -> bool:
    return jax.sharding.get_abstract_mesh().shape.get(_BATCH, 1) > 1


def _mapped(f: Callable[..., Any], arguments: tuple[Any, ...], whole: tuple[int, ...], out: PartitionSpec) -> Any:
    if not _split():
        return f(*arguments)
    specs = tuple(PartitionSpec() if i in whole else PartitionSpec(_BATCH) for i in range(len(arguments)))
    # Gradients written by hand (custom_vjp) do not say what varies over devices, which is what would be checked.
    return jax.shard_map(f, in_specs=specs, out_specs=out, check_vma=False)(*arguments)
