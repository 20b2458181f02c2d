"""The model's parameters as a tree: the partitions that they declare, and the kinds of parameters.

The tree is a pure dict of arrays, {"embedding": …, "blocks": {"attention": {"query": {"weight": …}, …}, …}, …}, which
checkpoints store under these names. The leaves under "blocks" have a leading axis of layers.
"""

from typing import Any, Literal

from flax import nnx

from slm_jax.distributed.partitioning import Partition, Partitions
from slm_jax.model.transformer import Transformer


def collect_partitions(model: nnx.Module) -> Partitions:
    """Return the partition that each parameter of a model declares as `nnx.Param(value, partition=…)`, by its path.

    A declaration is about the axes of one layer's parameter; the leading axis of layers is not split.

    Raises:
        ValueError: If a parameter declares no partition, or one with a wrong number of axes; names it.
    """
    partitions: dict[tuple[str, ...], Partition] = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        names = tuple(map(str, path))
        partition = param.get_metadata().get("partition")
        if partition is None:
            raise ValueError(
                f"parameter {'.'.join(names)} declares no partition: create it as nnx.Param(value, partition=(…)), an "
                "axis of the mesh or None for each of its axes, () to replicate it"
            )
        ndim = len(param.shape) - (names[0] == "blocks")
        if partition and len(partition) != ndim:
            raise ValueError(
                f"parameter {'.'.join(names)} has {ndim} axes, but declares the partition {partition}: declare an axis "
                "of the mesh or None for each"
            )
        partitions[names] = (None, *partition) if partition and names[0] == "blocks" else partition
    return partitions


def pure_params(model: Transformer) -> dict[str, Any]:
    """Return the model's parameters as a pure dict of arrays."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def join(frozen: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a model of which one tree is frozen and another one is trained, such as adapters."""
    joined = dict(frozen)
    for name, value in trained.items():
        joined[name] = join(frozen[name], value) if name in frozen else value
    return joined


def is_in_blocks(path: tuple[Any, ...]) -> bool:
    """Return whether a parameter belongs to the blocks and so has a leading axis of layers.

    Args:
        path: Key path of the parameter in the tree, as `jax.tree_util` gives it.
    """
    return getattr(path[0], "key", None) == "blocks"


_GATES = ("head_gate", "value_gate")


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Return whether a parameter is a matrix, or a stack of them, rather than a vector of scales or a gate's weights.

    Args:
        path: Key path of the parameter in the tree.
        leaf: The array or its shape and dtype.
    """
    is_gate = any(getattr(key, "key", None) in _GATES for key in path)
    return leaf.ndim >= (3 if is_in_blocks(path) else 2) and not is_gate


def parameter_group(path: tuple[Any, ...], leaf: Any) -> Literal["embedding", "head", "vector", "matrix"]:
    """Return the group of a parameter, for which it may have a learning rate of its own.

    Args:
        path: Key path of the parameter in the tree.
        leaf: The array or its shape and dtype.
    """
    if not is_matrix(path, leaf):
        return "vector"
    names = [str(getattr(key, "key", "")) for key in path]
    if any("embedding" in name for name in names):
        return "embedding"
    return "head" if names[0] == "head" else "matrix"


def has_vocabulary_axis(path: tuple[Any, ...]) -> bool:
    """Return whether a parameter, or a moment of one, has one row per vocabulary entry: embeddings and head."""
    return any(getattr(key, "key", None) in ("embedding", "head", "table") for key in path)
