"""Sentences, last words and questions: from rows of a set and a model's scores to figures with their intervals."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.evaluation.datasets import Row
from slm_jax.evaluation.encoding import continuations, num_bytes, sentences
from slm_jax.evaluation.intervals import binomial, bootstrap
from slm_jax.evaluation.references import BLIMP, BLIMP_PARADIGMS, LAMBADA_ACCURACY, LAMBADA_PERPLEXITY
from slm_jax.evaluation.results import Figure, Measured
from slm_jax.evaluation.scoring import Item, TokenScores
from slm_jax.utils.errors import UserError
from tokenizer import HybridTokenizer

Score = Callable[[Sequence[Item]], list[TokenScores]]


def measure_blimp(rows: list[Row], tokenizer: HybridTokenizer, score: Score) -> Measured:
    """The share of minimal pairs whose good sentence has the higher log-probability, all tokens summed (Warstadt et al.
    2020): in all, by field, by phenomenon and by paradigm."""
    pairs = zip(_texts(rows, "sentence_good"), _texts(rows, "sentence_bad"), strict=True)
    texts = [text for pair in pairs for text in pair]
    totals = np.array([scored.total for scored in score(sentences(tokenizer, texts))]).reshape(-1, 2)
    hits = totals[:, 0] > totals[:, 1]
    groups: dict[str, list[bool]] = defaultdict(list)
    names = [_texts(rows, column, optional=True) for column in ("field", "linguistics_term", "UID")]
    for *of_row, hit in zip(*names, hits.tolist(), strict=True):
        parts = [part for part in of_row if part]
        for depth in range(len(parts) + 1):
            groups[" / ".join(parts[:depth]) or "all"].append(hit)
    figures = [
        Figure(name, "accuracy", binomial(sum(of), len(of)), len(of), BLIMP if name == "all" else "chance 50 %")
        for name, of in sorted(groups.items(), key=lambda item: (item[0] != "all", item[0]))
    ]
    paradigms = len(set(names[-1]))
    note = (
        f"{paradigms} of {len(BLIMP_PARADIGMS)} paradigms; sum of the log-probabilities of all tokens of a sentence, "
        "given the <EOS> before it; no <EOS> is scored behind it; equal sums count as wrong"
    )
    return Measured(figures, note)


def measure_lambada(rows: list[Row], tokenizer: HybridTokenizer, score: Score) -> Measured:
    """The last word of a passage, whole: whether greedy decoding writes all its tokens, and the perplexity of it per
    word (Paperno et al. 2016; the last word is what follows the last space, as in EleutherAI's lm-eval)."""
    pairs = []
    for text in _texts(rows, "text"):
        context, space, word = text.rstrip().rpartition(" ")
        if not context:
            raise UserError(f"a passage of LAMBADA has one word only: {text[:80]!r}")
        pairs.append((context, space + word))
    made = continuations(tokenizer, pairs)
    scores = score(made.items)
    hits = sum(scored.greedy for scored in scores)
    nats = np.array([[-scored.total, 1.0] for scored in scores])
    perplexity = bootstrap(nats, lambda sums: np.exp(np.minimum(sums[..., 0] / sums[..., 1], 700.0)))
    tokens = np.mean([len(scored.ranks) for scored in scores])
    figures = [
        Figure("all", "accuracy", binomial(hits, len(rows)), len(rows), LAMBADA_ACCURACY),
        Figure("all", "perplexity", perplexity, len(rows), LAMBADA_PERPLEXITY),
    ]
    note = (
        f"{tokens:.2f} tokens a word, all to be right; perplexity per word; context and last word encoded apart, the "
        f"space with the word ({made.split} of {len(rows)} would be other tokens if encoded at once)"
    )
    return Measured(figures, note)


def _texts(rows: list[Row], column: str, optional: bool = False) -> list[str]:
    """A column that is to hold texts (optional: "" where there is none). Raises UserError where it does not."""
    texts = ["" if optional and row.get(column) is None else row[column] for row in rows]
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UserError(f"row {number}: {column} is no text: {text!r:.80}")
    return texts


class Question(NamedTuple):
    """A multiple-choice question."""

    context: str
    choices: list[str]
    answer: int


def measure_choices(
    read: Callable[[Row], Question], reference: str, rows: list[Row], tokenizer: HybridTokenizer, score: Score
) -> Measured:
    """The share of questions whose right choice is the most probable: by the sum of its tokens' log-probabilities
    (accuracy), and by that sum per byte of it (accuracy_norm), as acc and acc_norm of EleutherAI's lm-eval."""
    questions = []
    for number, row in enumerate(rows, start=1):
        try:
            question = read(row)
            if len(question.choices) < 2 or not 0 <= question.answer < len(question.choices):
                raise ValueError(f"answer {question.answer} of {len(question.choices)} choices")
        except ValueError as error:
            raise UserError(f"row {number} is no question: {error}: {str(row)[:200]}") from None
        questions.append(question)
    made = continuations(tokenizer, [(q.context, f" {choice}") for q in questions for choice in q.choices])
    totals = iter(score(made.items))
    hits = np.zeros(2, int)
    chance = 0.0
    for q in questions:
        sums = np.array([next(totals).total for _ in q.choices])
        sizes = np.array([max(num_bytes(choice), 1) for choice in q.choices])
        hits += np.array([sums.argmax(), (sums / sizes).argmax()]) == q.answer
        chance += 1 / len(q.choices) / len(questions)
    told = [f"chance {100 * chance:.0f} %", "; ".join(filter(None, [f"chance {100 * chance:.0f} %", reference]))]
    figures = [
        Figure("all", name, binomial(int(hit), len(rows)), len(rows), text)
        for name, hit, text in zip(("accuracy", "accuracy_norm"), hits, told, strict=True)
    ]
    note = "no examples before the question; accuracy: sum of log-probabilities; accuracy_norm: per byte of the choice"
    return Measured(figures, note)


def hellaswag(row: Row) -> Question:
    """Rowan/hellaswag, prepared as lm-eval does."""

    def clean(text: str) -> str:  # of the marks that WikiHow's texts carry
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = clean(f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}")
    return Question(context, [clean(ending) for ending in _text_list(row, "endings")], _number(row, "label"))


def piqa(row: Row) -> Question:
    """goal, sol1, sol2, label."""
    context = f"Question: {_text(row, 'goal')}\nAnswer:"
    return Question(context, [_text(row, "sol1"), _text(row, "sol2")], _number(row, "label"))


def arc(row: Row) -> Question:
    """allenai/ai2_arc."""
    choices = row["choices"]
    if not isinstance(choices, dict):
        raise ValueError(f"choices is no object: {choices!r:.80}")
    texts, labels, answer = _text_list(choices, "text"), _text_list(choices, "label"), _text(row, "answerKey")
    if len(texts) != len(labels) or answer not in labels:
        raise ValueError(f"answer {answer} of the labels {', '.join(labels)} of {len(texts)} choices")
    return Question(f"Question: {_text(row, 'question')}\nAnswer:", texts, labels.index(answer))


def plain(row: Row) -> Question:
    """context, choices, answer (from 0)."""
    return Question(_text(row, "context"), _text_list(row, "choices"), _number(row, "answer"))


def _text(row: Row, column: str) -> str:
    """Raises ValueError for what is none, as the two below."""
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"{column} is no text: {value!r:.80}")
    return value


def _text_list(row: Row, column: str) -> list[str]:
    value = row.get(column)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{column} is no list of texts: {value!r:.80}")
    return value


def _number(row: Row, column: str) -> int:
    value = row.get(column)
    if type(value) is int or (isinstance(value, str) and re.fullmatch("[0-9]+", value)):
        return int(value)
    raise ValueError(f"{column} is no whole number: {value!r:.80}")
