"""Conversations about Python's standard library, generated from its own documentation, without a network.

Questions about the names of `python_facts` in the phrasings of `chat_phrasings`, questions that follow up on the one
before, names that do not exist (`invented_names`), and small talk. Training conversations use other phrasings and
other invented names than held-out ones; the facts are the same, so that held-out conversations ask for documented facts
in words that were not trained on.
"""

import hashlib
import json
import platform
import random
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

from slm_jax.chat.messages import Message
from slm_jax.data.sources import chat_phrasings as phrasings
from slm_jax.data.sources.chat_phrasings import Phrasings
from slm_jax.data.sources.documents import CountingReader, Document
from slm_jax.data.sources.invented_names import InventedName, invented_names
from slm_jax.data.sources.python_facts import Fact, facts

NUM_ROUNDS = 24
"""Times that training conversations ask for each fact, each time in another phrasing."""

REFUSAL = "I do not know"
"""The first words of an answer about a name that does not exist."""

FACTS = "facts"
INVENTED = "invented names"
SMALL_TALK = "small talk"

_REFUSALS_PER_FACT = 0.35  # questions about invented names in a round, for each question about a fact
_HELDOUT_NAMES = 240
_SYSTEM_SHARE = 0.25  # conversations that begin with a system message
_FOLLOW_UP_SHARE = 0.35  # questions about a fact after which another one about the same name follows
_MAX_QUESTIONS = 4  # of a conversation
_FORMAT = 2  # of the conversations; part of the cache key


class Question(NamedTuple):
    """A kind of question about a name: its phrasings, also as a follow-up question, and the answer."""

    kind: str
    phrasings: Phrasings
    again: Phrasings | None
    answer: str


class Exchange(NamedTuple):
    """A question in one phrasing, and its answer."""

    user: str
    assistant: str


class HeldOutChat(NamedTuple):
    """A held-out conversation.

    Attributes:
        kind: "facts / " and the kind of question, "invented names / " and the style of invention, or "small talk".
        messages: The messages before the answer.
        answer: The right answer.
    """

    kind: str
    messages: tuple[Message, ...]
    answer: str


class PythonChat:
    """The conversations as a `Source`: those to train on, then the held-out ones as its validation split."""

    name = "python-chat"

    def describe(self) -> Any:
        """Return Python's version and a digest of the facts, since docstrings also differ between builds."""
        digest = hashlib.sha256(json.dumps(facts()).encode()).hexdigest()[:16]
        return ["python-chat", platform.python_version(), _FORMAT, digest]

    def read(self, position: Any = None) -> CountingReader:
        """Read from a position, the number of conversations read before."""
        return CountingReader(_documents(), position, platform.python_version())


def _documents() -> Iterator[Document]:
    for messages in training_chats():
        yield Document("", split="train", messages=messages)
    for chat in heldout_chats():
        messages = (*chat.messages, Message("assistant", chat.answer))
        yield Document("", split="validation", messages=messages)


def questions(fact: Fact) -> list[Question]:
    """Return the questions that a fact answers, the one about its purpose first."""
    if fact.kind == "module":
        return [Question("purpose", phrasings.MODULE_PURPOSE, phrasings.PURPOSE_AGAIN, fact.purpose)]
    purpose = phrasings.PURPOSE
    if fact.kind == "class":
        by_class = phrasings.CLASS_PURPOSE
        purpose = Phrasings(purpose.train + by_class.train, by_class.heldout + purpose.heldout[:3])
    result = [Question("purpose", purpose, phrasings.PURPOSE_AGAIN, fact.purpose)]
    if fact.arguments is not None:
        answer = f"Its arguments are ({fact.arguments})." if fact.arguments else "It takes no arguments."
        result.append(Question("arguments", phrasings.ARGUMENTS, phrasings.ARGUMENTS_AGAIN, answer))
    if fact.returns:
        result.append(Question("returns", phrasings.RETURNS, phrasings.RETURNS_AGAIN, fact.returns))
    if fact.module and fact.unique:
        answer = f"It is in the module {fact.module}."
        result.append(Question("location", phrasings.LOCATION, phrasings.LOCATION_AGAIN, answer))
    return result


def _asked_name(fact: Fact, question: Question) -> str:
    return fact.last if question.kind == "location" else fact.name


def training_chats() -> Iterator[tuple[Message, ...]]:
    """Yield the training conversations in a fixed order."""
    invented = invented_names("train", frozenset(each.name for each in heldout_names()))
    for number in range(NUM_ROUNDS):
        rng = random.Random(f"python-chat, round {number}")
        threads = [*_fact_threads(number, rng), *_small_talk_threads(rng)]
        threads += _refusal_threads(invented, int(_REFUSALS_PER_FACT * len(threads)), rng)
        rng.shuffle(threads)
        yield from _joined(threads, rng)


def _fact_threads(number: int, rng: random.Random) -> Iterator[list[Exchange]]:
    """Yield one thread (a question, perhaps with a follow-up question) for each question about each fact."""
    for index, fact in enumerate(facts()):
        asked = questions(fact)
        for question in asked:
            templates = question.phrasings.train
            template = templates[(number + index) % len(templates)]
            thread = [Exchange(template.format(name=_asked_name(fact, question)), question.answer)]
            others = [each for each in asked if each.kind != question.kind]
            if others and rng.random() < _FOLLOW_UP_SHARE:
                other = rng.choice(others)
                assert other.again is not None
                thread.append(Exchange(rng.choice(other.again.train), other.answer))
            yield thread


def _refusal_threads(invented: Iterator[InventedName], count: int, rng: random.Random) -> Iterator[list[Exchange]]:
    for item in islice(invented, count):
        kinds, again = _kinds_asked(item)
        answer = refusal(item.name)
        thread = [Exchange(rng.choice(rng.choice(kinds).train).format(name=item.name), answer)]
        if rng.random() < _FOLLOW_UP_SHARE / 2:
            thread.append(Exchange(rng.choice(rng.choice(again).train), answer))
        yield thread


def _small_talk_threads(rng: random.Random) -> Iterator[list[Exchange]]:
    for templates, answer in phrasings.SMALL_TALK:
        for template in rng.sample(templates.train, min(4, len(templates.train))):
            yield [Exchange(template, answer)]


def _kinds_asked(item: InventedName) -> tuple[list[Phrasings], list[Phrasings]]:
    """Return the phrasings in which an invented name is asked for, and those of follow-up questions."""
    kinds = [phrasings.PURPOSE, phrasings.PURPOSE, phrasings.ARGUMENTS, phrasings.RETURNS]
    again = [phrasings.PURPOSE_AGAIN, phrasings.ARGUMENTS_AGAIN, phrasings.RETURNS_AGAIN]
    if "." not in item.name:
        kinds.append(phrasings.LOCATION)
        again.append(phrasings.LOCATION_AGAIN)
    return kinds, again


def refusal(name: str) -> str:
    """Return the answer about a name that does not exist."""
    return f"{REFUSAL} {name}."


def _joined(threads: list[list[Exchange]], rng: random.Random) -> Iterator[tuple[Message, ...]]:
    """Join threads to conversations of one to `_MAX_QUESTIONS` questions, some of them with a system message."""
    remaining = iter(threads)
    for thread in remaining:
        exchanges = list(thread)
        while len(exchanges) < rng.randint(1, _MAX_QUESTIONS):
            exchanges += next(remaining, [])
        yield _messages(exchanges, rng)


def _messages(exchanges: list[Exchange], rng: random.Random) -> tuple[Message, ...]:
    messages = []
    if rng.random() < _SYSTEM_SHARE:
        messages.append(Message("system", rng.choice(phrasings.SYSTEM_MESSAGES)))
    for exchange in exchanges:
        messages += [Message("user", exchange.user), Message("assistant", exchange.assistant)]
    return tuple(messages)


@cache
def heldout_names() -> tuple[InventedName, ...]:
    """Return the invented names of held-out conversations."""
    return tuple(islice(invented_names("held out"), _HELDOUT_NAMES))


def heldout_chats() -> Iterator[HeldOutChat]:
    """Yield the held-out conversations in a fixed order: facts and follow-ups, invented names, small talk."""
    rng = random.Random("python-chat, held out")
    for fact in facts():
        asked = questions(fact)
        for question in asked:
            user = rng.choice(question.phrasings.heldout).format(name=_asked_name(fact, question))
            yield _heldout(f"{FACTS} / {question.kind}", [], user, question.answer, rng)
        if len(asked) > 1:
            first, other = rng.sample(asked, 2)
            before = Exchange(rng.choice(first.phrasings.train).format(name=_asked_name(fact, first)), first.answer)
            assert other.again is not None
            yield _heldout(f"{FACTS} / follow-up", [before], rng.choice(other.again.heldout), other.answer, rng)
    for item in heldout_names():
        user = rng.choice(rng.choice(_kinds_asked(item)[0]).heldout).format(name=item.name)
        yield _heldout(f"{INVENTED} / {item.style}", [], user, refusal(item.name), rng)
    for templates, answer in phrasings.SMALL_TALK:
        for user in templates.heldout:
            yield _heldout(SMALL_TALK, [], user, answer, rng)


def _heldout(kind: str, before: list[Exchange], user: str, answer: str, rng: random.Random) -> HeldOutChat:
    return HeldOutChat(kind, (*_messages(before, rng), Message("user", user)), answer)
