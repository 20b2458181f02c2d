"""Metrics of conversations: right, wrong and refused answers, the form of turns, and constraints of instructions."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from slm_jax.chat.messages import Message
from slm_jax.data.sources.python_chat import FACTS, REFUSAL, heldout_chats
from slm_jax.evaluation.datasets import Dataset, Record
from slm_jax.evaluation.instructions import INSTRUCTIONS, satisfied
from slm_jax.evaluation.intervals import binomial_interval, bootstrap_interval
from slm_jax.evaluation.replies import Conversation, ReplyFunction
from slm_jax.evaluation.results import Metric, TaskResult
from slm_jax.utils.errors import UserError

Outcome = Literal["right", "wrong", "refused"]
_OUTCOMES: tuple[Outcome, ...] = ("right", "wrong", "refused")


def python_chat_records() -> Dataset:
    """Return the held-out conversations of `python-chat`, with the columns `messages`, `answer` and `kind`."""
    records = [
        {"messages": [message._asdict() for message in chat.messages], "answer": chat.answer, "kind": chat.kind}
        for chat in heldout_chats()
    ]
    return Dataset(records, "held-out conversations of python-chat")


def instruction_records() -> Dataset:
    """Return the project's own instructions, with the columns `prompt` and `checks`."""
    return Dataset([{"prompt": prompt, "checks": list(checks)} for prompt, checks in INSTRUCTIONS], "built-in prompts")


def outcome(text: str, answer: str) -> Outcome:
    """Compare a reply with the right answer, which it must equal but for white space at its ends."""
    text = text.strip()
    if text == answer.strip():
        return "right"
    return "refused" if text.startswith(REFUSAL) else "wrong"


def measure_facts(records: list[Record], reply: ReplyFunction) -> TaskResult:
    """Compute how many questions are answered right, wrong, or with a refusal ("I do not know …").

    Args:
        records: Conversations that end with a message of the user, with the columns `messages`, `answer`, and
            optionally `kind` ("facts / …" if it is missing). An answer that is itself a refusal is about a name that
            does not exist.
        reply: `Replier.reply` of the model.

    Returns:
        Shares of the three outcomes over all questions about facts, and by kind; over all names that do not exist the
        shares that are refused (`invented_refused_share`) and in exactly the right words, with the name
        (`invented_right_share`).

    Raises:
        UserError: A record is not a conversation with an answer.
    """
    conversations = _conversations(records)
    answers = [_text(record, "answer", number) for number, record in enumerate(records, start=1)]
    groups: dict[str, list[Outcome]] = defaultdict(list)
    invented: list[Outcome] = []
    for record, answer, given in zip(records, answers, reply(conversations), strict=True):
        result = outcome(given.text, answer)
        kind = str(record.get("kind") or FACTS)
        if kind.partition(" / ")[0] == FACTS:
            groups["all"].append(result)
        if answer.startswith(REFUSAL):
            invented.append(result)
        groups[kind].append(result)
    metrics = []
    for group in sorted(groups, key=lambda name: (name != "all", name)):
        metrics += [_share(group, f"{name}_share", (each == name for each in groups[group])) for name in _OUTCOMES]
    if invented:
        metrics.append(_share("all", "invented_refused_share", (each != "wrong" for each in invented)))
        metrics.append(_share("all", "invented_right_share", (each == "right" for each in invented)))
    note = (
        f'right: the whole reply equals the answer; refused: another reply that begins with "{REFUSAL}"; wrong: all '
        "others. All: questions about documented facts; invented: names that do not exist, of which right replies "
        "refuse and repeat the name. Greedy decoding, up to the end of the turn"
    )
    return TaskResult(metrics, note)


def measure_format(records: list[Record], reply: ReplyFunction) -> TaskResult:
    """Compute how many replies have the form of a turn.

    Args:
        records: Conversations that end with a message of the user, with the column `messages`.
        reply: `Replier.reply` of the model.

    Returns:
        `ended_share` (the model ends its turn before the limit), `clean_share` (no token inside that begins or ends
        a turn), `text_share` (the reply is not empty), and the mean number of `tokens`.

    Raises:
        UserError: A record is not a conversation.
    """
    replies = reply(_conversations(records))
    tokens_Nx2 = np.array([[each.tokens, 1.0] for each in replies])
    metrics = [
        _share("all", "ended_share", (each.ended for each in replies)),
        _share("all", "clean_share", (not each.special for each in replies)),
        _share("all", "text_share", (bool(each.text.strip()) for each in replies)),
        Metric("all", "tokens", bootstrap_interval(tokens_Nx2, lambda sums: sums[..., 0] / sums[..., 1]), len(replies)),
    ]
    return TaskResult(
        metrics, "ended: before the limit of tokens; clean: without tokens of roles or turns; none is suppressed"
    )


def measure_instructions(records: list[Record], reply: ReplyFunction) -> TaskResult:
    """Compute how many replies satisfy the constraints of their instructions, in the manner of IFEval.

    Args:
        records: Instructions, with the columns `prompt` and `checks` (see `instructions.satisfied`).
        reply: `Replier.reply` of the model.

    Returns:
        `prompt_share` (all constraints of a prompt are satisfied; prompt-level strict accuracy of IFEval),
        `check_share` (of all constraints), and the share of each constraint.

    Raises:
        UserError: A record is not a prompt with constraints, or a constraint is unknown.
    """
    prompts = [_text(record, "prompt", number) for number, record in enumerate(records, start=1)]
    replies = reply([(Message("user", prompt),) for prompt in prompts])
    by_check: dict[str, list[bool]] = defaultdict(list)
    whole = []
    for number, (record, given) in enumerate(zip(records, replies, strict=True), start=1):
        checks = record["checks"]
        if not isinstance(checks, list) or not checks or not all(isinstance(check, dict) for check in checks):
            raise UserError(f'record {number}: checks is not a list such as [{{"check": "words", "value": 3}}]')
        results = [satisfied(given.text, check) for check in checks]
        whole.append(all(results))
        for check, result in zip(checks, results, strict=True):
            by_check[str(check["check"])].append(result)
    metrics = [
        _share("all", "prompt_share", whole),
        _share("all", "check_share", (each for results in by_check.values() for each in results)),
    ]
    metrics += [_share(name, "check_share", by_check[name]) for name in sorted(by_check)]
    note = "constraints verified by a program; an empty reply satisfies none; the prompts are not those of IFEval"
    return TaskResult(metrics, note)


def _share(group: str, name: str, hits: Iterable[bool]) -> Metric:
    values = list(hits)
    return Metric(group, name, binomial_interval(sum(values), len(values)), len(values))


def _conversations(records: list[Record]) -> list[Conversation]:
    return [_conversation(record["messages"], number) for number, record in enumerate(records, start=1)]


def _conversation(value: Any, number: int) -> Conversation:
    """Return the messages of a record as a tuple. Raises UserError if they are none or do not end with the user's."""
    valid = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )
    if not valid or not value or value[-1]["role"] != "user":
        raise UserError(f"record {number}: messages is not a list of role and content that ends with the user's")
    return tuple(Message(message["role"], message["content"]) for message in value)


def _text(record: Record, column: str, number: int) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise UserError(f"record {number}: {column} is not text: {value!r:.80}")
    return value
