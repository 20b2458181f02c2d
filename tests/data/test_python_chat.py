"""python-chat: conversations about the standard library, whose held-out phrasings and names are never trained on."""

import importlib
import inspect
import itertools
import platform
import re
import string

import pytest

from slm_jax.chat.messages import check_order
from slm_jax.config.schema import DataConfig
from slm_jax.data.sources import chat_phrasings, python_chat
from slm_jax.data.sources.chat_phrasings import Phrasings
from slm_jax.data.sources.invented_names import STYLES, invented_names
from slm_jax.data.sources.python_chat import PythonChat, heldout_chats, heldout_names, training_chats
from slm_jax.data.sources.python_facts import facts, sentence
from slm_jax.data.sources.registry import make_sources


def words(text):
    return re.sub(rf"[{re.escape(string.punctuation)}]", " ", text.lower()).split()


def all_phrasings():
    named = [value for value in vars(chat_phrasings).values() if isinstance(value, Phrasings)]
    return named + [phrasings for phrasings, _ in chat_phrasings.SMALL_TALK]


@pytest.fixture(scope="module")
def training():
    """The conversations of the first two rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_chat, "NUM_ROUNDS", 2)
        return list(training_chats())


def questions_of(chats):
    return {message.content for messages in chats for message in messages if message.role == "user"}


def test_source_resumes_at_any_position_and_ends_with_the_held_out_split(monkeypatch):
    monkeypatch.setattr(python_chat, "NUM_ROUNDS", 1)
    ((source, _),) = make_sources(DataConfig(source="python-chat"))
    documents = list(source.read())
    assert documents == list(source.read())
    for position in (1, 700, len(documents) - 1):
        reader = source.read()
        assert list(itertools.islice(reader, position)) == documents[:position]
        assert list(source.read(reader.position())) == documents[position:]
    splits = [document.split for document in documents]
    assert splits == sorted(splits)  # train before validation
    assert splits.count("validation") == len(list(heldout_chats()))
    for document in documents:
        check_order(document.messages, generation_prompt=False)
        assert document.messages[-1].role == "assistant"
        assert all(message.content.strip() == message.content != "" for message in document.messages)


def test_cache_key_has_the_version_and_the_facts(monkeypatch):
    before = PythonChat().describe()
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    other_version = PythonChat().describe()
    monkeypatch.undo()
    monkeypatch.setattr(python_chat, "facts", lambda: facts()[1:])
    assert len({str(each) for each in (before, other_version, PythonChat().describe())}) == 3


def test_phrasings_are_held_out():
    for phrasings in all_phrasings():
        assert phrasings.train
        assert phrasings.heldout
        trained = {tuple(words(each)) for each in phrasings.train}
        assert trained.isdisjoint(tuple(words(each)) for each in phrasings.heldout)
        fields = {tuple(re.findall(r"\{.*?\}", each)) for each in phrasings.train + phrasings.heldout}
        assert fields in ({("{name}",)}, {()})


def test_held_out_questions_are_not_trained_on_and_their_facts_are(training):
    with_heldout = list(heldout_chats())
    trained = {tuple(words(each)) for each in questions_of(training)}
    assert trained.isdisjoint(tuple(words(chat.messages[-1].content)) for chat in with_heldout)
    answers = {message.content for messages in training for message in messages if message.role == "assistant"}
    invented = {item.name for item in heldout_names()}
    for chat in with_heldout:
        assert (chat.answer in answers) is not chat.kind.startswith("invented")
    for question in questions_of(training):
        assert invented.isdisjoint(re.findall(r"[\w.]+\w", question)), question


def test_facts_are_those_of_the_installed_python():
    seen = set()
    for fact in facts():
        assert fact.name not in seen
        seen.add(fact.name)
        value = resolve(fact.name)
        assert fact.purpose[1:].rstrip(".") in " ".join(inspect.getdoc(value).split())
        if fact.module:
            assert hasattr(importlib.import_module(fact.module), fact.last)
        if fact.arguments is not None:
            names = [name for name in inspect.signature(value).parameters if name != "self"]
            given = [re.match(r"\w+", part.lstrip("*")) for part in fact.arguments.split(", ")]
            assert [match[0] for match in given if match] == names
        if fact.returns:
            assert fact.returns.partition("returns ")[2] == fact.purpose.partition(" ")[2]
    assert len(seen) > 400
    assert {"os.path.join", "len", "str.split", "shutil", "math.sqrt"} <= seen


def resolve(name):
    """Import a dotted name: the longest prefix that is a module, then attributes; else a built-in name."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]) or "builtins")
            for part in parts[length:]:
                value = getattr(value, part)
        except (ImportError, AttributeError):
            continue
        return value
    return None


def test_invented_names_do_not_exist_and_are_refused():
    chats = [chat for chat in heldout_chats() if chat.kind.startswith("invented")]
    assert [item.style for item in heldout_names()[: len(STYLES)]] == list(STYLES)
    last_parts = {fact.last for fact in facts()}
    for item in itertools.islice(invented_names("train"), 3000):
        assert item.name not in last_parts, "a question about its module has an answer"
    for item, chat in zip(heldout_names(), chats, strict=True):
        assert resolve(item.name) is None, item
        assert item.name not in last_parts
        assert chat.kind == f"invented names / {item.style}"
        assert chat.answer == f"I do not know {item.name}."
        assert item.name in chat.messages[-1].content
    known = frozenset(item.name for item in heldout_names())
    assert known.isdisjoint(item.name for item in itertools.islice(invented_names("held out", known), 300))


def test_first_sentences():
    assert sentence("Return the *sum* of x.  Raise nothing.\n\nMore.") == "Return the *sum* of x."
    assert sentence("S.find(sub[, start]) -> int\n\nreturn the lowest index") == "Return the lowest index."
    assert sentence("sleep(seconds)\n\nDelay execution.") == "Delay execution."
    for unsuitable in (
        "",
        "Sqrt.",
        "Return some names, e.g. os.",
        "D.keys() -> a view",
        f"A {'long ' * 20}one.",
        "Größe ist.",
    ):
        assert sentence(unsuitable) == ""


def test_conversations_have_follow_ups_system_messages_and_small_talk(training):
    roles = ["".join(message.role[0] for message in messages) for messages in training]
    assert {"ua", "sua", "uaua", "suaua", "uauaua"} <= set(roles)
    assert 0.15 < sum(each.startswith("s") for each in roles) / len(roles) < 0.35
    asked = questions_of(training)
    assert "Who are you?" in asked
    assert "What does it return?" in asked
