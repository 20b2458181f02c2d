"""The tasks by name: where their sets lie, what their rows hold, how they are measured."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from slm_jax.evaluation import references, tasks
from slm_jax.evaluation.datasets import HubRows, Row
from slm_jax.evaluation.references import BLIMP_PARADIGMS
from slm_jax.evaluation.results import Measured
from slm_jax.evaluation.tasks import Question, Score
from tokenizer import HybridTokenizer


class Task(NamedTuple):
    """A set of rows on the hub or in local files, and how it is measured."""

    about: str
    columns: tuple[str, ...]  # that each row must have
    measure: Callable[[list[Row], HybridTokenizer, Score], Measured]
    hub: HubRows | None = None


def _choices(
    about: str, columns: str, read: Callable[[Row], Question], hub: HubRows | None = None, reference: str = ""
) -> Task:
    return Task(about, tuple(columns.split()), functools.partial(tasks.measure_choices, read, reference), hub)


TASKS = {
    "blimp": Task(
        "minimal pairs of sentences, of which the good one is to be more probable (67 paradigms of 1,000)",
        ("sentence_good", "sentence_bad"),
        tasks.measure_blimp,
        HubRows("nyu-mll/blimp", "train", BLIMP_PARADIGMS),
    ),
    "lambada": Task(
        "the last word of 5,153 passages: whether greedy decoding writes it, and its perplexity",
        ("text",),
        tasks.measure_lambada,
        HubRows("EleutherAI/lambada_openai", "test", ("default",)),
    ),
    "hellaswag": _choices(
        "how a scene goes on: 10,042 questions of four endings",
        "activity_label ctx_a ctx_b endings label",
        tasks.hellaswag,
        HubRows("Rowan/hellaswag", "validation"),
        references.HELLASWAG,
    ),
    "piqa": _choices(
        "physical common sense: 1,838 questions of two answers",
        "goal sol1 sol2 label",
        tasks.piqa,
        HubRows("baber/piqa", "validation"),  # ybisk/piqa is made by a script, which is not run
        references.PIQA,
    ),
    "arc_easy": _choices(
        "school science: 2,376 questions of three to five answers",
        "question choices answerKey",
        tasks.arc,
        HubRows("allenai/ai2_arc", "test", ("ARC-Easy",)),
    ),
    "arc_challenge": _choices(
        "school science, 1,172 harder questions",
        "question choices answerKey",
        tasks.arc,
        HubRows("allenai/ai2_arc", "test", ("ARC-Challenge",)),
        references.ARC_CHALLENGE,
    ),
    "choices": _choices("your own questions, from a file", "context choices answer", tasks.plain),
}
