"""The tasks by name: data set, required columns and metric.

To add a task, write a function that maps records to a `TaskResult` (or to a `Question`, for multiple choice) in
tasks.py, and add an entry to `TASKS`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from slm_jax.evaluation import chat_tasks, references, tasks
from slm_jax.evaluation.datasets import Dataset, HubLocation, Record
from slm_jax.evaluation.references import BLIMP_PARADIGMS
from slm_jax.evaluation.replies import ReplyFunction
from slm_jax.evaluation.results import TaskResult
from slm_jax.evaluation.tasks import Question, ScoreFunction
from slm_jax.utils.text_tokenizer import TextTokenizer


class Task(NamedTuple):
    """A task over the records of a data set.

    Attributes:
        description: One line for `--tasks list`.
        columns: Columns that every record must have.
        measure: Computes the metrics from all records.
        hub: The data set on the Hugging Face hub; None: the task needs a file.
        score: The metric over all records that stands for the task where one number is shown.
        to_question: Of multiple choice, maps a record to its question; raises ValueError for an invalid one.
    """

    description: str
    columns: tuple[str, ...]
    measure: Callable[[list[Record], TextTokenizer, ScoreFunction], TaskResult]
    hub: HubLocation | None = None
    score: str = "accuracy"
    to_question: Callable[[Record], Question] | None = None


class ChatTask(NamedTuple):
    """A task over the replies of the model to conversations.

    Attributes:
        description: One line for `--tasks list`.
        columns: Columns that every record must have.
        measure: Computes the metrics from all records.
        records: Returns the built-in records.
        score: The metric over all records that stands for the task where one number is shown.
    """

    description: str
    columns: tuple[str, ...]
    measure: Callable[[list[Record], ReplyFunction], TaskResult]
    records: Callable[[], Dataset]
    score: str


PAIR_COLUMNS = ("sentence_good", "sentence_bad")
SPECIAL_SCORES = {"heldout": "top1_accuracy", "analogies": "accuracy_3cosadd", "core": "core"}
"""The metric that stands for a task that is not computed from records."""


def _multiple_choice(
    description: str,
    columns: str,
    to_question: Callable[[Record], Question],
    hub: HubLocation | None = None,
    reference: str = "",
) -> Task:
    measure = functools.partial(tasks.measure_multiple_choice, to_question, reference)
    return Task(description, tuple(columns.split()), measure, hub, "accuracy_norm", to_question)


TASKS = {
    "blimp": Task(
        "grammar: share of minimal pairs whose acceptable sentence is more probable (67 paradigms of 1,000 pairs)",
        PAIR_COLUMNS,
        tasks.measure_blimp,
        HubLocation("nyu-mll/blimp", "train", BLIMP_PARADIGMS),
    ),
    "lambada": Task(
        "last word of 5,153 passages: accuracy of greedy decoding, and perplexity",
        ("text",),
        tasks.measure_lambada,
        HubLocation("EleutherAI/lambada_openai", "test", ("default",)),
    ),
    "hellaswag": _multiple_choice(
        "commonsense sentence completion: 10,042 questions with four endings",
        "activity_label ctx_a ctx_b endings label",
        tasks.hellaswag_question,
        HubLocation("Rowan/hellaswag", "validation"),
        references.HELLASWAG,
    ),
    "piqa": _multiple_choice(
        "physical commonsense: 1,838 questions with two answers",
        "goal sol1 sol2 label",
        tasks.piqa_question,
        HubLocation("baber/piqa", "validation"),  # ybisk/piqa needs a loading script, and scripts are never executed
        references.PIQA,
    ),
    "arc_easy": _multiple_choice(
        "grade-school science: 2,376 questions with three to five answers",
        "question choices answerKey",
        tasks.arc_question,
        HubLocation("allenai/ai2_arc", "test", ("ARC-Easy",)),
    ),
    "arc_challenge": _multiple_choice(
        "grade-school science: 1,172 harder questions",
        "question choices answerKey",
        tasks.arc_question,
        HubLocation("allenai/ai2_arc", "test", ("ARC-Challenge",)),
        references.ARC_CHALLENGE,
    ),
    "choices": _multiple_choice(
        "your own multiple-choice questions, from a file", "context choices answer", tasks.plain_question
    ),
}

CHAT_TASKS = {
    "chat-facts": ChatTask(
        "questions about Python in phrasings that python-chat holds out: shares of right, wrong and refused answers",
        ("messages", "answer"),
        chat_tasks.measure_facts,
        chat_tasks.python_chat_records,
        "right_share",
    ),
    "chat-format": ChatTask(
        "form of the replies to these questions: the turn ends, without tokens of other roles",
        ("messages",),
        chat_tasks.measure_format,
        chat_tasks.python_chat_records,
        "ended_share",
    ),
    "chat-instructions": ChatTask(
        "40 instructions whose constraints a program verifies (number of words, last words, lower case …)",
        ("prompt", "checks"),
        chat_tasks.measure_instructions,
        chat_tasks.instruction_records,
        "prompt_share",
    ),
}
