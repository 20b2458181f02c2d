"""What a measurement gives."""

from dataclasses import dataclass
from typing import NamedTuple

from slm_jax.evaluation.intervals import Estimate


@dataclass(frozen=True)
class Figure:
    """One number of a task. group: "all" or a part of the set, the widest name first ("syntax / binding")."""

    group: str
    metric: str
    estimate: Estimate
    count: int  # of the items (pairs, questions, documents …) that it is of
    reference: str = ""  # what others reach, and who says so


class Measured(NamedTuple):
    """The figures of a task, and what one should know of how they were taken."""

    figures: list[Figure]
    note: str
