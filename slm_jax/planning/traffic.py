"""Bytes that a compiled step reads from and writes to the device's memory, estimated from the shapes in the program.

A TPU compiler's own figure (`cost_analysis`) counts the body of a loop once and includes traffic with vector memory,
on the chip; NVIDIA's has none. Here each instruction
that runs as a kernel reads its operands and writes its result once; of an array that a fusion only slices, the slice
counts. Caches are not considered, which matters for arrays of a few megabytes on GPUs. Arrays in a TPU's vector memory
and cuBLAS's scratch memory do not count.
"""

from collections.abc import Iterator

from slm_jax.planning.hlo import Array, Computation, Instruction, Module, run_counts

_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier async-done copy-done custom-call-done".split()
)
_FREE_CALLS = ('custom_call_target="ConcatBitcast"', 'custom_call_target="AllocateBuffer"')
_CUBLAS = 'custom_call_target="__cublas'  # returns (product, scratch memory), of which the product is written
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
        return _fusion_bytes(module, module.computations[instruction.called[0]], operands, instruction)
    if opcode in _COPIES:
        source, target = (instruction.arrays[index] for index in _COPIES[opcode])
        return target.bytes * ((not source.on_chip) + (not target.on_chip))
    if opcode.endswith("-start"):
        return 2 * sum(_size(operand.arrays) for operand in operands)
    results = instruction.arrays[:1] if _CUBLAS in instruction.attributes else instruction.arrays
    return _size(results) + sum(_size(operand.arrays) for operand in operands)


def _fusion_bytes(module: Module, fused: Computation, operands: list[Instruction], fusion: Instruction) -> int:
    """Return the bytes of a fusion: of operands that are only sliced the slices, of results in place the update."""
    parameters = _parameters(fused)
    read = sum(
        _read_bytes(module, fused, parameters[index], operand) if index in parameters else _size(operand.arrays)
        for index, operand in enumerate(operands)
    )
    results = {array.bytes for array in fusion.arrays if not array.on_chip}
    in_place = sum(stack - update for stack, update in _updates(module, fused) if stack in results)
    return read + max(_size(fusion.arrays) - in_place, 0)


def _parameters(fused: Computation) -> dict[int, str]:
    """Return the names of a computation's parameters by their number."""
    parameters = (each for each in fused.values() if each.opcode == "parameter" and each.argument.isdigit())
    return {int(each.argument): each.name for each in parameters}


def _read_bytes(module: Module, fused: Computation, name: str, operand: Instruction) -> int:
    """Return the bytes that a computation, and fusions inside it, read of an operand: all, or only slices of it.

    Args:
        module: The program.
        fused: The computation.
        name: The operand's name in it.
        operand: The array outside, whose memory counts.
    """
    everything = _size(operand.arrays)
    total = 0
    for user in fused.values():
        if name not in user.operands:
            continue
        if user.opcode in _PARTIAL:
            total += _size(user.arrays, operand.arrays)
        elif user.opcode == "bitcast":
            total += _read_bytes(module, fused, user.name, operand)
        elif user.opcode == "fusion" and len(user.called) == 1:
            inner = module.computations[user.called[0]]
            places = [index for index, argument in enumerate(user.operands) if argument == name]
            names = _parameters(inner)
            total += sum(_read_bytes(module, inner, names[index], operand) for index in places)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            return everything
    return min(total, everything)


def _updates(module: Module, fused: Computation) -> Iterator[tuple[int, int]]:
    """Yield the bytes of each array that a computation, or a fusion inside it, updates in place, and of the update."""
    for each in fused.values():
        if each.opcode == "dynamic-update-slice":
            update = fused[each.operands[1]]
            yield sum(array.bytes for array in each.arrays), sum(array.bytes for array in update.arrays)
        elif each.opcode == "fusion":
            for name in each.called:
                yield from _updates(module, module.computations[name])


def _size(arrays: tuple[Array, ...], place: tuple[Array, ...] | None = None) -> int:
    """Return the bytes of those arrays that are in main memory.

    Args:
        arrays: The arrays.
        place: Arrays that these are parts of, whose memory counts.
    """
    if place is not None:
        return sum(array.bytes for array in arrays) if _size(place) else 0
    return sum(array.bytes for array in arrays if not array.on_chip)
