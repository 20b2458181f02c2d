"""Metrics of tasks over records: minimal pairs, last words and multiple-choice questions."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.evaluation.datasets import Record
from slm_jax.evaluation.encoding import continuation_items, num_bytes, sentence_items
from slm_jax.evaluation.intervals import binomial_interval, bootstrap_interval
from slm_jax.evaluation.references import BLIMP, BLIMP_PARADIGMS, LAMBADA_ACCURACY, LAMBADA_PERPLEXITY
from slm_jax.evaluation.results import Metric, TaskResult
from slm_jax.evaluation.scoring import Item, TokenScores
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer

ScoreFunction = Callable[[Sequence[Item]], list[TokenScores]]
MAX_NATS = 700.0  # exp of more overflows float64


def measure_blimp(records: list[Record], tokenizer: TextTokenizer, score: ScoreFunction) -> TaskResult:
    """Compute BLiMP (Warstadt et al. 2020): how often the acceptable sentence of a pair has the higher log-probability.

    Args:
        records: Minimal pairs, with the columns `sentence_good` and `sentence_bad`, and optionally `field`,
            `linguistics_term` and `UID` (the paradigm).
        tokenizer: The tokenizer of the model.
        score: `Scorer.score` of the model.

    Returns:
        Accuracy over all pairs, by field, by phenomenon and by paradigm.

    Raises:
        UserError: A column is not text.
    """
    pairs = zip(_text_column(records, "sentence_good"), _text_column(records, "sentence_bad"), strict=True)
    texts = [text for pair in pairs for text in pair]
    scores = score(sentence_items(tokenizer, texts))
    totals_Px2 = np.array([scored.total for scored in scores]).reshape(-1, 2)
    hits_P = totals_Px2[:, 0] > totals_Px2[:, 1]
    categories = [_text_column(records, column, optional=True) for column in ("field", "linguistics_term", "UID")]
    groups: dict[str, list[bool]] = defaultdict(list)
    for *names, hit in zip(*categories, hits_P.tolist(), strict=True):
        parts = [name for name in names if name]
        for depth in range(len(parts) + 1):
            groups[" / ".join(parts[:depth]) or "all"].append(hit)
    metrics = []
    for group in sorted(groups, key=lambda name: (name != "all", name)):
        hits = groups[group]
        reference = BLIMP if group == "all" else "chance 50 %"
        metrics.append(Metric(group, "accuracy", binomial_interval(sum(hits), len(hits)), len(hits), reference))
    num_paradigms = len(set(categories[-1]))
    note = (
        f"{num_paradigms} of {len(BLIMP_PARADIGMS)} paradigms; score: sum of the log-probabilities of all tokens of a "
        "sentence, given the <EOS> before it; no <EOS> is scored after it; ties count as wrong"
    )
    return TaskResult(metrics, note)


def measure_lambada(records: list[Record], tokenizer: TextTokenizer, score: ScoreFunction) -> TaskResult:
    """Compute LAMBADA (Paperno et al. 2016): prediction of the last word of a passage, given the rest.

    The last word is the text after the last space, as in EleutherAI's lm-eval.

    Args:
        records: Passages, with the column `text`.
        tokenizer: The tokenizer of the model.
        score: `Scorer.score` of the model.

    Returns:
        Accuracy (greedy decoding generates all tokens of the word) and perplexity per word.

    Raises:
        UserError: A passage is not text or has only one word.
    """
    pairs = []
    for text in _text_column(records, "text"):
        context, space, word = text.rstrip().rpartition(" ")
        if not context:
            raise UserError(f"a LAMBADA passage has only one word: {text[:80]!r}")
        pairs.append((context, space + word))
    continuations = continuation_items(tokenizer, pairs)
    scores = score(continuations.items)
    hits = sum(scored.greedy for scored in scores)
    nats_and_words = np.array([[-scored.total, 1.0] for scored in scores])
    perplexity = bootstrap_interval(
        nats_and_words, lambda sums: np.exp(np.minimum(sums[..., 0] / sums[..., 1], MAX_NATS))
    )
    count = len(records)
    metrics = [
        Metric("all", "accuracy", binomial_interval(hits, count), count, LAMBADA_ACCURACY),
        Metric("all", "perplexity", perplexity, count, LAMBADA_PERPLEXITY),
    ]
    tokens_per_word = np.mean([len(scored.ranks) for scored in scores])
    note = (
        f"{tokens_per_word:.2f} tokens per word, all of which must be right; perplexity per word; the space "
        "belongs to the last word, which is encoded separately where the tokens of the context would change otherwise "
        f"({continuations.num_resplit} of {count} would)"
    )
    return TaskResult(metrics, note)


def _text_column(records: list[Record], column: str, optional: bool = False) -> list[str]:
    """Return a column of texts; optional: "" where it is missing. Raises UserError for a value that is not text."""
    texts = ["" if optional and record.get(column) is None else record[column] for record in records]
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UserError(f"record {number}: {column} is not text: {text!r:.80}")
    return texts


class Question(NamedTuple):
    """A multiple-choice question; `answer` is the index of the right choice."""

    context: str
    choices: list[str]
    answer: int


def measure_multiple_choice(
    to_question: Callable[[Record], Question],
    reference: str,
    records: list[Record],
    tokenizer: TextTokenizer,
    score: ScoreFunction,
) -> TaskResult:
    """Compute how often the right choice of a question is the most probable one.

    Args:
        to_question: Maps a record to a question; raises ValueError for an invalid one.
        reference: Published scores for `accuracy_norm`; may be empty.
        records: The records.
        tokenizer: The tokenizer of the model.
        score: `Scorer.score` of the model.

    Returns:
        `accuracy`, by the sum of the log-probabilities of a choice's tokens, and `accuracy_norm`, by that sum per byte
        of the choice. They are acc and, for choices in ASCII, acc_norm of EleutherAI's lm-eval, which divides by
        characters.

    Raises:
        UserError: A record is not a valid question.
    """
    questions = _questions(records, to_question)
    pairs = [(question.context, f" {choice}") for question in questions for choice in question.choices]
    totals = iter([scored.total for scored in score(continuation_items(tokenizer, pairs).items)])
    hits = 0
    hits_norm = 0
    chance = 0.0
    for question in questions:
        sums = np.array([next(totals) for _ in question.choices])
        sizes = np.array([max(num_bytes(choice), 1) for choice in question.choices])
        hits += int(sums.argmax() == question.answer)
        hits_norm += int((sums / sizes).argmax() == question.answer)
        chance += 1 / len(question.choices) / len(questions)
    count = len(records)
    chance_text = f"chance {100 * chance:.0f} %"
    reference_norm = f"{chance_text}; {reference}" if reference else chance_text
    metrics = [
        Metric("all", "accuracy", binomial_interval(hits, count), count, chance_text),
        Metric("all", "accuracy_norm", binomial_interval(hits_norm, count), count, reference_norm),
    ]
    note = "zero-shot; accuracy: by the sum of log-probabilities; accuracy_norm: by that sum per byte of the choice"
    return TaskResult(metrics, note)


def _questions(records: list[Record], to_question: Callable[[Record], Question]) -> list[Question]:
    questions = []
    for number, record in enumerate(records, start=1):
        try:
            question = to_question(record)
            if len(question.choices) < 2 or not 0 <= question.answer < len(question.choices):
                raise ValueError(f"answer {question.answer} of {len(question.choices)} choices")
        except ValueError as error:
            raise UserError(f"record {number} is not a valid question: {error}: {str(record)[:200]}") from None
        questions.append(question)
    return questions


def hellaswag_question(record: Record) -> Question:
    """Return the question of a record of Rowan/hellaswag, prepared as in lm-eval."""

    def clean(text: str) -> str:  # remove the markup of the WikiHow texts
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    activity = _text(record, "activity_label")
    context = clean(f"{activity}: {_text(record, 'ctx_a')} {_text(record, 'ctx_b').capitalize()}")
    endings = [clean(ending) for ending in _text_list(record, "endings")]
    return Question(context, endings, _integer(record, "label"))


def piqa_question(record: Record) -> Question:
    """Return the question of a record of PIQA (columns goal, sol1, sol2, label)."""
    context = f"Question: {_text(record, 'goal')}\nAnswer:"
    return Question(context, [_text(record, "sol1"), _text(record, "sol2")], _integer(record, "label"))


def arc_question(record: Record) -> Question:
    """Return the question of a record of allenai/ai2_arc."""
    choices = record["choices"]
    if not isinstance(choices, dict):
        raise ValueError(f"choices is not an object: {choices!r:.80}")
    texts = _text_list(choices, "text")
    labels = _text_list(choices, "label")
    answer = _text(record, "answerKey")
    if len(texts) != len(labels) or answer not in labels:
        raise ValueError(f"answer {answer} is not one of the labels {', '.join(labels)} of {len(texts)} choices")
    return Question(f"Question: {_text(record, 'question')}\nAnswer:", texts, labels.index(answer))


def plain_question(record: Record) -> Question:
    """Return the question of a record with the columns context, choices and answer (counted from 0).

    Raises:
        ValueError: A column has the wrong type, or a choice is empty or the same as another one: between equal choices
            the first would always win. Published data sets are not checked for this, to stay comparable with lm-eval.
    """
    choices = _text_list(record, "choices")
    first_index: dict[str, int] = {}
    for index, choice in enumerate(choices):
        text = choice.strip()
        if not text:
            raise ValueError(f"choice {index} is empty")
        if text in first_index:
            raise ValueError(f"choices {first_index[text]} and {index} are the same")
        first_index[text] = index
    return Question(_text(record, "context"), choices, _integer(record, "answer"))


def _text(record: Record, column: str) -> str:
    """Return a column's text. Raises ValueError for another type, as do the two functions below."""
    value = record.get(column)
    if not isinstance(value, str):
        raise ValueError(f"{column} is not text: {value!r:.80}")
    return value


def _text_list(record: Record, column: str) -> list[str]:
    value = record.get(column)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{column} is not a list of texts: {value!r:.80}")
    return value


def _integer(record: Record, column: str) -> int:
    value = record.get(column)
    # bool is a subclass of int, but True is not an answer.
    if type(value) is int or (isinstance(value, str) and re.fullmatch("[0-9]+", value)):
        return int(value)
    raise ValueError(f"{column} is not an integer: {value!r:.80}")
