"""Read a compiled program as XLA prints it: its computations, their instructions, and how often each of them runs.

Only what plans need is read. The text format is XLA's `HloModule::ToString`: one instruction a line, `%name = shape
opcode(%operand, …), attribute=…`. How often a loop runs is the compiler's `known_trip_count`, else the constant that
the counter is compared with in the loop's condition (loops of `jax.lax.scan` count from 0 in steps of 1).
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "s16": 16, "u16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


class Array(NamedTuple):
    """One array of a shape.

    Attributes:
        dtype: Name of the dtype in XLA, `bf16`.
        dims: Sizes of the axes.
        on_chip: True if the array is in a TPU's vector memory (VMEM) instead of its main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> int:
        """Size without the padding of its layout."""
        return math.prod(self.dims) * _BITS.get(self.dtype, 8) // 8


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        name: Its name.
        opcode: `fusion`, `all-gather-start`, …
        arrays: The arrays of its result; several of a tuple.
        operands: Names of its operands.
        attributes: The text behind the operands.
        argument: The text between the parentheses.
        is_root: True if its result is that of the computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    argument: str
    is_root: bool

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        names = _CALLS.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names

    @property
    def bytes(self) -> int:
        """Size of the result."""
        return sum(array.bytes for array in self.arrays)


Computation = dict[str, Instruction]
"""Instructions by name, in order."""


class Module(NamedTuple):
    """A compiled program.

    Attributes:
        computations: All computations by name.
        entry: Name of the first one.
    """

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Read the text of a compiled program."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation = {}
    for line in text.splitlines():
        if line.endswith("{") and not line[:1].isspace() and not line.startswith("HloModule"):
            header = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            assert header is not None
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match[2], match[3], bool(match[1]))
            if instruction is not None:
                current[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(name: str, text: str, is_root: bool) -> Instruction | None:
    """Return the instruction with the text behind the equals sign; None if it is none."""
    end = _closing(text, 0) if text.startswith("(") else text.find(" ") - 1
    shape = text[: end + 1]
    opcode, parenthesis, _ = text[end + 2 :].partition("(")
    if not parenthesis:
        return None
    start = end + 2 + len(opcode)
    stop = _closing(text, start)
    argument = text[start + 1 : stop]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(name, opcode, tuple(_arrays(shape)), operands, text[stop + 1 :], argument, is_root)


def _closing(text: str, start: int) -> int:
    """Return the position of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    return len(text) - 1


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(shape):
        yield Array(dtype, tuple(int(size) for size in dims.split(",") if size), "S(1)" in layout)


def run_counts(module: Module) -> dict[str, int]:
    """Return how often each computation runs in one call of the program, fused computations included.

    Conditionals count all of their branches.
    """
    counts = dict.fromkeys(module.computations, 0)

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for instruction in module.computations[name].values():
            loops = trip_count(module, instruction) if instruction.opcode == "while" else 1
            for called in instruction.called:
                if called in module.computations:
                    visit(called, times * loops)

    visit(module.entry, 1)
    return counts


def trip_count(module: Module, loop: Instruction) -> int:
    """Return how often a loop runs; 1 if that is not known."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    instructions = module.computations.get(condition[1], {}) if condition else {}
    for instruction in instructions.values():
        if instruction.is_root and instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
            limit = instructions.get(instruction.operands[-1])
            if limit is not None and limit.opcode == "constant" and limit.argument.isdigit():
                return int(limit.argument)
    return 1
