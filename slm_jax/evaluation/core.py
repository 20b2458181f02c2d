"""CORE (DataComp-LM, arXiv:2406.11794): the mean of the centered accuracy over 22 few-shot tasks.

Data, prompts, examples and decisions are those of nanochat's `core_eval.py`, so that scores are comparable with its
published ones:

- The records of a task are shuffled with the seed 1337; a limit takes the first ones. The examples of record i are
  drawn with the seed 1234 + i from the others.
- `multiple_choice`: the same context with each choice; `schema`: each context with the same continuation. The answer is
  the one whose tokens, from (up to) where the prompts begin (cease) to differ, have the highest mean log-probability.
- `language_modeling`: greedy decoding must give the continuation exactly.
- Prompts that exceed the context lose their beginning.
- Centered accuracy is 0 at the random baseline of a task and 1 if all is right: (accuracy - b) / (1 - b).
"""

import logging
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.evaluation.core_bundle import CoreTask
from slm_jax.evaluation.datasets import Record
from slm_jax.evaluation.encoding import with_start
from slm_jax.evaluation.intervals import binomial_interval, centered_mean_interval
from slm_jax.evaluation.references import CORE, CORE_TASKS
from slm_jax.evaluation.results import Metric, TaskResult
from slm_jax.evaluation.scoring import Item, TokenScores
from slm_jax.evaluation.tasks import ScoreFunction
from slm_jax.utils.text_tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

_SHUFFLE_SEED = 1337
_EXAMPLES_SEED = 1234
_QUESTIONS = 1000  # records whose prompts are in memory at a time


class Prompts(NamedTuple):
    """The prompts of one record.

    Attributes:
        texts: A prompt for each choice or context; of language modeling the prompt without and with the continuation.
        kind: Type of the task.
    """

    texts: list[str]
    kind: str


def shuffled(records: list[Record], limit: int = 0) -> list[Record]:
    """Return the records of a task in the order of their few-shot examples, the first `limit` of them (0: all)."""
    order = list(records)
    random.Random(_SHUFFLE_SEED).shuffle(order)
    return order[:limit] if limit else order


def examples(records: Sequence[Record], index: int, count: int) -> list[Record]:
    """Return the few-shot examples of the record at an index; all others, if they are fewer than `count`."""
    others = [i for i in range(len(records)) if i != index]
    if not count:
        return []
    return [records[i] for i in random.Random(_EXAMPLES_SEED + index).sample(others, min(count, len(others)))]


def render(task: CoreTask, record: Record, shots: Sequence[Record]) -> Prompts:
    """Return the prompts of a record.

    Args:
        task: The task.
        record: The record.
        shots: Its few-shot examples.
    """
    delimiter = task.delimiter
    if task.kind == "multiple_choice":
        before = "".join(f"{each['query']}{delimiter}{each['choices'][each['gold']]}\n\n" for each in shots)
        return Prompts([f"{before}{record['query']}{delimiter}{choice}" for choice in record["choices"]], task.kind)
    if task.kind == "schema":
        before = "".join(
            f"{each['context_options'][each['gold']]}{delimiter}{each['continuation']}\n\n" for each in shots
        )
        ending = f"{delimiter}{record['continuation']}"
        return Prompts([f"{before}{context}{ending}" for context in record["context_options"]], task.kind)
    before = "".join(f"{each['context'].strip()}{delimiter}{each['continuation']}\n\n" for each in shots)
    context = f"{before}{record['context'].strip()}{delimiter}"
    return Prompts([context.strip(), f"{context}{record['continuation']}"], task.kind)


def prompt_items(prompts: Prompts, ids: Sequence[np.ndarray], rest: np.ndarray, tokenizer: TextTokenizer) -> list[Item]:
    """Return the sequences to score for the prompts of a record.

    Args:
        prompts: The prompts.
        ids: Their token ids.
        rest: Of language modeling, the token ids of the continuation alone, which are used where the tokens of the
            prompt with it do not begin with those of the prompt without it.
        tokenizer: The tokenizer.
    """
    sequences = [with_start(tokenizer, each) for each in ids]
    if prompts.kind == "language_modeling":
        without, complete = sequences
        if not np.array_equal(complete[: without.size], without) or complete.size == without.size:
            complete = np.concatenate([without, rest])
        return [Item(complete, without.size)]
    if prompts.kind == "schema":
        suffix = _common([each[::-1] for each in sequences])
        return [Item(each, max(each.size - suffix, 1)) for each in sequences]
    prefix = _common(sequences)
    return [Item(each, prefix) for each in sequences]


def _common(sequences: Sequence[np.ndarray]) -> int:
    """Return the length of the common beginning of sequences."""
    length = min(each.size for each in sequences)
    differs = np.zeros(length, bool)
    for each in sequences[1:]:
        differs |= each[:length] != sequences[0][:length]
    return int(differs.argmax()) if differs.any() else length


def cropped(item: Item, context: int) -> Item:
    """Return an item without the beginning that exceeds the context."""
    excess = item.ids.size - context
    return item if excess <= 0 else Item(item.ids[excess:], max(item.first - excess, 1))


def is_right(record: Record, kind: str, scores: Sequence[TokenScores]) -> bool:
    """Return whether the scores of a record's sequences give the right answer."""
    if kind == "language_modeling":
        return scores[0].greedy
    means = [-float(each.logprobs.mean()) if each.logprobs.size else float("nan") for each in scores]
    return means.index(min(means)) == record["gold"]


def answers(
    task: CoreTask, records: list[Record], tokenizer: TextTokenizer, score: ScoreFunction, context: int
) -> tuple[np.ndarray, int]:
    """Answer the records of a task.

    Args:
        task: The task.
        records: Its records, `shuffled`.
        tokenizer: The tokenizer of the model.
        score: `Scorer.score` of the model.
        context: Maximum number of tokens of a prompt.

    Returns:
        Which records are answered right, bool [N], and the number of those whose prompts lost their beginning.
    """
    hits = np.zeros(len(records), bool)
    num_cropped = 0
    for start in range(0, len(records), _QUESTIONS):
        chosen = range(start, min(start + _QUESTIONS, len(records)))
        groups = list(_items(task, records, chosen, tokenizer))
        num_cropped += sum(any(item.ids.size > context for item in group) for group in groups)
        scores = iter(score([cropped(item, context) for group in groups for item in group]))
        for i, group in zip(chosen, groups, strict=True):
            hits[i] = is_right(records[i], task.kind, [next(scores) for _ in group])
    return hits, num_cropped


def _items(
    task: CoreTask, records: list[Record], chosen: Sequence[int], tokenizer: TextTokenizer
) -> Iterator[list[Item]]:
    """Yield the sequences of each chosen record."""
    prompts = [render(task, records[i], examples(records, i, task.shots)) for i in chosen]
    ids = iter(tokenizer.encode_arrays([text for each in prompts for text in each.texts]))
    is_language = task.kind == "language_modeling"
    rests = [each.texts[1].strip()[len(each.texts[0]) :] if is_language else "" for each in prompts]
    for each, rest in zip(prompts, tokenizer.encode_arrays(rests), strict=True):
        yield prompt_items(each, [next(ids) for _ in each.texts], rest, tokenizer)


def measure_core(
    tasks: Sequence[tuple[CoreTask, list[Record]]],
    tokenizer: TextTokenizer,
    score: ScoreFunction,
    context: int,
    keep: np.ndarray | None = None,
    verbose: bool = False,
) -> TaskResult:
    """Compute CORE, and accuracy and centered accuracy of each task.

    Args:
        tasks: The tasks with their records, `shuffled`.
        tokenizer: The tokenizer of the model.
        score: `Scorer.score` of the model.
        context: Maximum number of tokens of a prompt.
        keep: Which of the records of all tasks count, bool [N]; None: all. Examples are drawn from all.
        verbose: Log each task when it is done.

    Returns:
        `core` with the bootstrap interval over the items of each task; for each task `accuracy` (exact interval) and
        `centered_accuracy`.
    """
    metrics: list[Metric] = []
    counts: list[tuple[int, int, float]] = []
    num_cropped = 0
    done = 0
    for number, (task, records) in enumerate(tasks, start=1):
        hits, cropped_here = answers(task, records, tokenizer, score, context)
        num_cropped += cropped_here
        if keep is not None:
            hits = hits[keep[done : done + len(records)]]
        done += len(records)
        if not hits.size:
            continue
        right, count = int(hits.sum()), hits.size
        counts.append((right, count, task.baseline))
        chance = f"chance {100 * task.baseline:g} %" if task.baseline else ""
        accuracy = binomial_interval(right, count)
        centered = type(accuracy)(*((each - task.baseline) / (1 - task.baseline) for each in accuracy))  # type: ignore[operator]
        metrics.append(Metric(task.label, "accuracy", accuracy, count, chance))
        metrics.append(Metric(task.label, "centered_accuracy", centered, count))
        if verbose:
            logger.info("core: %s %.1f %% (%d of %d tasks)", task.label, 100 * right / count, number, len(tasks))
    total = Metric("all", "core", centered_mean_interval(counts), sum(count for _, count, _ in counts), CORE)
    return TaskResult([total, *metrics], _note(tasks, len(counts), num_cropped, done, context))


def _note(
    tasks: Sequence[tuple[CoreTask, list[Record]]], num_counted: int, num_cropped: int, total: int, context: int
) -> str:
    labels = {task.label for task, _ in tasks}
    other = "" if labels == set(CORE_TASKS) else ", which are not the 22 of the paper"
    cut = f"; the prompts of {num_cropped:,} of {total:,} items exceed {context} tokens and lost their beginning"
    return (
        f"mean of the centered accuracy of {num_counted} few-shot tasks{other}; prompts and examples of nanochat's "
        f"core_eval.py; interval by resampling the items of each task{cut if num_cropped else ''}"
    )
