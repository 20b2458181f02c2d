"""Bytes that a compiled step reads from and writes to the device's memory, estimated from the shapes in the program.

A TPU compiler's own figure (`cost_analysis`) counts the body of a loop once and includes traffic with vector memory,
on the chip; NVIDIA's has none. Here each instruction
that runs as a kernel reads its operands and writes its result once; of an array that a fusion only slices, the slice
counts. Caches are not considered, which matters for arrays of a few megabytes on GPUs. Arrays in a TPU's vector memory
do not count.
"""

from slm_jax.planning.hlo import Array, Computation, Instruction, Module, run_counts

_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier async-done copy-done custom-call-done".split()
)
_FREE_CALLS = ('custom_call_target="ConcatBitcast"', 'custom_call_target="AllocateBuffer"')
_PARTIAL = ("dynamic-slice", "slice", "gather")  # read as much of their first operand as they return
_COPIES = {"copy-start": (1, 0), "slice-start": (0, 1)}  # positions of (source, target) in the result


def traffic_bytes(module: Module, loops: bool = True) -> int:
    """Return the bytes that a step reads and writes on one device.

    Args:
        module: The compiled program.
        loops: Multiply the bodies of loops by how often they run; False: count them once, as compilers do.
    """
    counts = run_counts(module)
    fused = {
        name
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode not in ("while", "conditional", "call")
        for name in instruction.called
    }
    total = 0
    for name, computation in module.computations.items():
        if name in fused or not counts[name]:
            continue
        times = counts[name] if loops else 1
        total += times * sum(_bytes(module, computation, instruction) for instruction in computation.values())
    return total


def _bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or any(call in instruction.attributes for call in _FREE_CALLS):
        return 0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode in _PARTIAL:
        return 2 * _size(instruction.arrays)
    if opcode == "dynamic-update-slice":
        return 2 * _size(operands[1].arrays)
    if opcode == "fusion" and len(instruction.called) == 1:
        return _fusion_bytes(module.computations[instruction.called[0]], operands, instruction)
    if opcode in _COPIES:
        source, target = (instruction.arrays[index] for index in _COPIES[opcode])
        return target.bytes * ((not source.on_chip) + (not target.on_chip))
    if opcode.endswith("-start"):
        return 2 * sum(_size(operand.arrays) for operand in operands)
    return _size(instruction.arrays) + sum(_size(operand.arrays) for operand in operands)


def _fusion_bytes(fused: Computation, operands: list[Instruction], fusion: Instruction) -> int:
    """Return the bytes of a fusion: of operands that are only sliced the slices, of results in place the update."""
    parameters = {
        int(each.argument): each for each in fused.values() if each.opcode == "parameter" and each.argument.isdigit()
    }
    total = 0
    in_place = 0
    for index, operand in enumerate(operands):
        size = _size(operand.arrays)
        parameter = parameters.get(index)
        users = [each for each in fused.values() if parameter is not None and parameter.name in each.operands]
        if users and all(each.opcode in _PARTIAL for each in users):
            size = min(size, sum(_size(each.arrays, operand.arrays) for each in users))
        elif users and all(
            each.opcode == "dynamic-update-slice" and each.operands[0] == parameter.name  # type: ignore[union-attr]
            for each in users
        ):
            in_place += size
            size = min(size, sum(_size(fused[each.operands[1]].arrays, operand.arrays) for each in users))
            in_place -= size
        total += size
    return total + max(_size(fusion.arrays) - in_place, 0)


def _size(arrays: tuple[Array, ...], place: tuple[Array, ...] | None = None) -> int:
    """Return the bytes of those arrays that are in main memory.

    Args:
        arrays: The arrays.
        place: Arrays that these are parts of, whose memory counts.
    """
    if place is not None:
        return sum(array.bytes for array in arrays) if _size(place) else 0
    return sum(array.bytes for array in arrays if not array.on_chip)
