"""Sentences, last words and questions: from rows of a set and a model's scores to figures with their intervals."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.errors import UserError
from slm_jax.evaluation.figures import Figure, Measured
from slm_jax.evaluation.intervals import binomial, bootstrap
from slm_jax.evaluation.references import BLIMP, BLIMP_PARADIGMS, LAMBADA_ACCURACY, LAMBADA_PERPLEXITY
from slm_jax.evaluation.rows import Row
from slm_jax.evaluation.scoring import Item, TokenScores
from slm_jax.evaluation.texts import continuations, num_bytes, sentences
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
    for row, hit in zip(rows, hits.tolist(), strict=True):
        parts = [row.get("field") or "", row.get("linguistics_term") or "", row.get("UID") or ""]
        parts = [part for part in parts if part]
        for depth in range(len(parts) + 1):
            groups[" / ".join(parts[:depth]) or "all"].append(hit)
    figures = [
        Figure(name, "accuracy", binomial(sum(of), len(of)), len(of), BLIMP if name == "all" else "chance 50 %")
        for name, of in sorted(groups.items(), key=lambda item: (item[0] != "all", item[0]))
    ]
    paradigms = len({row.get("UID") for row in rows})
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


def _texts(rows: list[Row], column: str) -> list[str]:
    """A column that is to hold texts. Raises UserError where it does not."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row[column], str):
            raise UserError(f"row {number}: {column} is no text: {row[column]!r:.80}")
    return [row[column] for row in rows]


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
            if not all(isinstance(text, str) for text in (question.context, *question.choices)):
                raise ValueError("the context or a choice is no text")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"row {number} is no question: {error!r}: {str(row)[:200]}") from None
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

    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return Question(context, [clean(ending) for ending in row["endings"]], int(row["label"]))


def piqa(row: Row) -> Question:
    """goal, sol1, sol2, label."""
    return Question(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def arc(row: Row) -> Question:
    """allenai/ai2_arc."""
    choices = row["choices"]
    return Question(
        f"Question: {row['question']}\nAnswer:", list(choices["text"]), list(choices["label"]).index(row["answerKey"])
    )


def plain(row: Row) -> Question:
    """context, choices, answer (from 0)."""
    return Question(row["context"], list(row["choices"]), int(row["answer"]))
