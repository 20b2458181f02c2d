"""Communication between devices in a compiled training step, by kind and size."""

from collections import Counter
from typing import NamedTuple

from slm_jax.planning.hlo import Array, Instruction, Module, run_counts

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """A kind of communication of arrays of one shape.

    Attributes:
        kind: One of `KINDS`.
        dtype: Dtype of the array.
        dims: Sizes of the array: the result of an all-gather, the operand of a reduce-scatter.
        times: How often a step does it.
    """

    kind: str
    dtype: str
    dims: tuple[int, ...]
    times: int

    @property
    def bytes(self) -> int:
        """Size of one array on one device."""
        return Array(self.dtype, self.dims, False).bytes

    @property
    def total_bytes(self) -> int:
        """Size of all of them in a step."""
        return self.times * self.bytes


def find_collectives(module: Module) -> list[Collective]:
    """Return the collectives of a step, the largest total first; collectives of several arrays count for each.

    TPU compilers write a reduce-scatter as a fusion named all-reduce-scatter around an all-reduce, and products with a
    gathered matrix as a loop that passes the parts around (collective-permute) while it multiplies.
    """
    counts = run_counts(module)
    repeated = _later_parts(module)
    found: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for name, computation in module.computations.items():
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or not counts[name] or name in repeated:
                continue
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            for array in _largest_arrays(kind, instruction, computation):
                found[kind, array.dtype, array.dims] += counts[name]
    collectives = [Collective(*key, times) for key, times in found.items()]
    return sorted(collectives, key=lambda each: -each.total_bytes)


def _later_parts(module: Module) -> set[str]:
    """Return the computations that continue or end a collective that another one has started.

    TPU compilers spread a collective over fusions that compute something else at the same time; each repeats it.
    """
    names = {name for name in module.computations if name.startswith("async_collective_fusion")}
    for computation in module.computations.values():
        for instruction in computation.values():
            if instruction.name.startswith("async-collective-done"):
                names.update(instruction.called)
    return names


def _largest_arrays(kind: str, instruction: Instruction, computation: dict[str, Instruction]) -> list[Array]:
    """Return the arrays of a collective in full: its operands or its results, whichever are larger."""
    operands = [computation[name].arrays for name in instruction.operands if name in computation]
    sources = [array for arrays in operands for array in arrays]
    results = [array for array in instruction.arrays if array.dims or kind == "all-reduce"]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        results = results[len(sources) :]  # (operands, results, synchronization)
    results = results[: len(sources)]
    return max(sources, results, key=lambda arrays: sum(array.bytes for array in arrays))
