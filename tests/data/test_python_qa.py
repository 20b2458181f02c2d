"""python-qa: questions about the standard library, answered by the first sentences of its docstrings."""

import importlib
import inspect
import itertools
import json

from slm_jax.config.schema import DataConfig
from slm_jax.data.sources.python_qa import first_sentence, rows
from slm_jax.data.sources.registry import make_sources


def test_answers_are_the_first_sentences_of_docstrings():
    found = {row["instruction"]: row["output"] for row in itertools.islice(rows(), 2500)}
    assert found["What does json.dumps do?"] == "Serialize ``obj`` to a JSON formatted ``str``."
    for name in ("calendar.isleap", "bisect.insort_right", "base64.b64encode", "collections.Counter.most_common"):
        module, _, path = name.partition(".")
        thing = importlib.import_module(module)
        for part in path.split("."):
            thing = getattr(thing, part)
        answer = found[f"What does {name} do?"]
        assert " ".join((inspect.getdoc(thing) or "").split()).startswith(answer)
        assert answer.endswith(".")
    assert len(set(found.values())) == len(found)


def test_first_sentence():
    assert first_sentence("Return the\n  value of 3.5 things.  And more.\n\nLong text.") == (
        "Return the value of 3.5 things."
    )
    assert first_sentence("Is it so, or is it not so? Yes.") == "Is it so, or is it not so?"
    for nothing in ("", "too short.", "no sentence ends in this paragraph\n\nEnd.", "x" * 300 + ". More."):
        assert first_sentence(nothing) == ""


def test_source_yields_instructions_and_resumes_at_any_position():
    (source, _), *_ = make_sources(DataConfig(source="python-qa"))
    reader = source.read()
    first = list(itertools.islice(iter(reader), 30))
    assert reader.position() == 30
    assert all(
        document.text.startswith("Question: What ") and document.text.endswith("?\nAnswer: ") for document in first
    )
    assert all(document.response and document.response not in document.text for document in first)
    assert list(itertools.islice(iter(source.read(20)), 10)) == first[20:]
    (other, _), *_ = make_sources(DataConfig(source="python-qa", template="Q {instruction}"))
    assert next(iter(other.read())).text.startswith("Q What ")
    assert other.describe() != source.describe()
    assert json.loads(json.dumps(source.describe())) == source.describe()  # as in a manifest
