"""The largest microbatch whose training step fits a device's memory, found with few compilations.

Memory grows close to linearly with the number of sequences computed at once, so that two programs predict all others;
the answer is compiled, never extrapolated.
"""

from collections.abc import Callable

from slm_jax.planning.program import Program
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import memory_size, plural

_FIXED_BYTES_PER_STATE_BYTE = 0.5  # first guess of the part of temporary memory that does not depend on the rows


def candidate_rows(rows_per_device: int) -> list[int]:
    """Return the microbatches of one device that a batch can be split into, in ascending order.

    Args:
        rows_per_device: The device's sequences of a batch.
    """
    return [rows for rows in range(1, rows_per_device + 1) if rows_per_device % rows == 0]


def largest_that_fits(
    compile_rows: Callable[[int], Program], candidates: list[int], limit: int, first: int
) -> tuple[Program, list[Program]]:
    """Search the largest microbatch whose program needs at most `limit` bytes.

    Args:
        compile_rows: Compiles the step with a number of sequences at once.
        candidates: Numbers of sequences, ascending.
        limit: Bytes of one device that a step may take.
        first: The candidate to begin with.

    Returns:
        (program, all programs that were compiled).

    Raises:
        UserError: If not even the smallest candidate fits.
    """
    programs: dict[int, Program] = {}
    rows = first
    while True:
        programs[rows] = compile_rows(rows)
        fitting = [n for n, program in programs.items() if program.needed_bytes <= limit]
        too_large = [n for n, program in programs.items() if program.needed_bytes > limit]
        lower = max(fitting, default=0)
        left = [n for n in candidates if lower < n < min(too_large, default=candidates[-1] + 1)]
        if not left:
            break
        predicted = [n for n in left if _predict(list(programs.values()), n) <= limit]
        if not predicted and fitting and (too_large or len(programs) > 1):
            break
        # Without a prediction that fits, the next candidate decides: the smallest, or the one above what fits.
        rows = max(predicted, default=left[0])
    if not fitting:
        smallest = programs[min(programs)]
        raise UserError(
            f"a step of this model needs {memory_size(smallest.needed_bytes)} of a device even with "
            f"{plural(smallest.rows, 'sequence')} at once, but {memory_size(limit)} are usable: use "
            "--model.remat full, more devices with --mesh.fsdp, a shorter --train.sequence_length or a smaller model"
        )
    return programs[lower], list(programs.values())


def _predict(programs: list[Program], rows: int) -> float:
    """Return the expected memory of a program with another number of sequences, from one or more that were compiled.

    The line through the two programs nearest to `rows`; through one program, a line with a guessed memory at 0.
    """
    nearest = sorted(programs, key=lambda program: abs(program.rows - rows))[:2]
    x1, y1 = nearest[0].rows, nearest[0].needed_bytes
    if len(nearest) == 1:
        x2 = 0
        y2 = min((1 + _FIXED_BYTES_PER_STATE_BYTE) * nearest[0].state_bytes, y1)
    else:
        x2, y2 = nearest[1].rows, nearest[1].needed_bytes
    return y1 + (rows - x1) * (y2 - y1) / (x2 - x1)
