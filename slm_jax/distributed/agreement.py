"""Agreement between the processes of a run: a decision is taken once and shared, or compared and refused.

Processes could decide differently wherever a decision depends on a clock, on free memory, on a file system, on a signal
or on the environment. Each such decision goes through one of these functions; README.md lists them.

    from_first    the first process decides, all get the result
    gather        every process contributes, all get the contributions of all
    attempt       every process tries, all know which failed
    minimum       the smallest contribution
    require_same  values that must be equal: an error names the process and both values

Every process calls the same functions in the same order. The values travel through the key-value store of JAX's
coordination service, as JSON: this needs no devices, and nothing is compiled. An error that the user can correct in one
process is raised in all.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from slm_jax.distributed import multihost
from slm_jax.utils.errors import UserError

T = TypeVar("T")

_TIMEOUT = 7 * 24 * 3600  # seconds: the first process may prepare a large corpus meanwhile

_numbers = itertools.count()  # the same in every process; each exchange has keys of its own


def from_first(subject: str, make: Callable[[], T]) -> T:
    """Call `make` in the first process and return its result in all.

    Args:
        subject: Text that names the decision, the same in every process.
        make: Function whose result JSON can represent.

    Raises:
        UserError: In all processes, if `make` raises it in the first.
    """
    if multihost.process_count() == 1:
        return make()
    answer = _attempt(make) if multihost.is_first() else {}
    answer = _exchange(subject, answer)[0]
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def gather(subject: str, make: Callable[[], T]) -> list[T]:
    """Call `make` in every process and return the results of all, in the order of the processes.

    Args:
        subject: Text that names the decision, the same in every process.
        make: Function whose result JSON can represent.

    Raises:
        UserError: In all processes, if `make` raises it in one; the text names the process.
    """
    if multihost.process_count() == 1:
        return [make()]
    answers = _exchange(subject, _attempt(make))
    for process, answer in enumerate(answers):
        if "error" in answer:
            raise UserError(f"process {process}: {answer['error']}")
    return [answer["value"] for answer in answers]


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The outcome of `attempt`.

    Attributes:
        value: The result in this process; None if it failed.
        error: The exception in this process; None if it succeeded.
        errors: Summaries of the exceptions by the number of the process; empty if all succeeded.
    """

    value: T | None
    error: Exception | None
    errors: dict[int, str]


def attempt(subject: str, make: Callable[[], T]) -> Outcome[T]:
    """Call `make`, which is no collective operation, in every process; a failure in one is known to all.

    Args:
        subject: Text that names the attempt, the same in every process.
        make: Function that may raise any exception.
    """
    value = None
    own = None
    try:
        value = make()
    except Exception as error:
        own = error
    summaries = gather(subject, lambda: summary(own) if own is not None else "")
    return Outcome(value, own, {process: text for process, text in enumerate(summaries) if text})


def summary(error: BaseException) -> str:
    """Return the type of an exception and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def minimum(subject: str, value: int) -> int:
    """Return the smallest value of all processes."""
    return min(gather(subject, lambda: value))


def require_same(subject: str, make: Callable[[], dict[str, Any]], remedy: str) -> None:
    """Refuse values that differ between processes.

    Args:
        subject: Text for the error message: "the options".
        make: Function that returns this process's values by name, which JSON can represent.
        remedy: What to do, the end of the error message.

    Raises:
        UserError: In every process, if one has other values than the first, with both values of up to five names, or if
            `make` raises it in one; names the process.
    """
    if multihost.process_count() == 1:
        return
    first, *others = gather(subject, make)
    for process, other in enumerate(others, 1):
        different = [
            f"{name} is {_quoted(first, name)} in process 0, {_quoted(other, name)} in process {process}"
            for name in dict.fromkeys([*first, *other])
            if name not in first or name not in other or first[name] != other[name]
        ]
        if different:
            more = f" and {len(different) - 5} more" if len(different) > 5 else ""
            raise UserError(f"{subject} of process {process} differ: {'; '.join(different[:5])}{more}: {remedy}")


def _quoted(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "not given"


def _attempt(make: Callable[[], Any]) -> dict[str, Any]:
    """Return the result of `make`, or the error that the user can correct."""
    try:
        return {"value": make()}
    except UserError as error:
        return {"error": str(error)}


def _exchange(subject: str, answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the answers of all processes, in their order.

    Raises:
        RuntimeError: The processes are not at the same point of the program.
    """
    from jax._src import distributed  # jax.distributed has no public access to its client; Orbax uses this one too

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("the processes are not connected: call lifecycle.initialize first")
    number = next(_numbers)
    folder = f"slm_jax/{number}/"
    client.key_value_set(f"{folder}{multihost.process_index()}", json.dumps({"subject": subject} | answer))
    client.wait_at_barrier(f"slm_jax {number}", 1000 * _TIMEOUT)
    texts = {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(folder)}
    if multihost.is_first() and number:  # every process has read the answers before: it would not be here otherwise
        client.key_value_delete(f"slm_jax/{number - 1}/")
    answers = [json.loads(texts[process]) for process in sorted(texts)]
    for process, other in enumerate(answers):
        if other["subject"] != subject:
            raise RuntimeError(
                f"the processes are at different points: {subject!r} in process {multihost.process_index()}, "
                f"{other['subject']!r} in process {process}"
            )
    return answers
