"""Tasks over conversations: outcomes and constraints against naive scorers, batches of replies against single ones."""

import json

import numpy as np
import pytest

from slm_jax.chat.messages import Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.evaluation import chat_tasks, replies
from slm_jax.evaluation.chat_tasks import measure_facts, measure_format, measure_instructions
from slm_jax.evaluation.instructions import CHECKS, INSTRUCTIONS, satisfied
from slm_jax.evaluation.replies import Replier, Reply
from slm_jax.utils.errors import UserError
from tests.evaluation.naive import NaiveModel
from tests.helpers import tiny_model
from tokenizer import HybridTokenizer

TURN_TOKENS = {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<EOS>"}


def values(result):
    return {(metric.group, metric.name): metric.estimate.value for metric in result.metrics}


def answering(texts):
    """Return a reply function that answers in turn with the texts."""
    return lambda conversations: [Reply(text, True, 0, 3) for text, _ in zip(texts, conversations, strict=True)]


def question(text, answer, kind=""):
    record = {"messages": [{"role": "user", "content": text}], "answer": answer}
    return record | ({"kind": kind} if kind else {})


def test_outcomes_are_counted_by_kind():
    records = [
        question("What is a?", "A.", "facts / purpose"),
        question("What is b?", "B.", "facts / purpose"),
        question("Where is c?", "C.", "facts / location"),
        question("Where is d?", "D."),
        question("What is x?", "I do not know x.", "invented names / coined"),
        question("What is y?", "I do not know y.", "invented names / coined"),
        question("What is z?", "I do not know z.", "invented names / other"),
        question("Hi", "Hello!", "small talk"),
    ]
    given = [" A.\n", "b.", "I do not know c.", "D.", "I do not know x.", "I do not know q.", "Z.", "Hello!"]
    result = values(measure_facts(records, answering(given)))
    assert [result["all", f"{name}_share"] for name in ("right", "wrong", "refused")] == [2 / 4, 1 / 4, 1 / 4]
    assert result["facts / purpose", "right_share"] == 1 / 2
    assert result["facts / location", "refused_share"] == 1
    assert result["all", "invented_refused_share"] == 2 / 3
    assert result["all", "invented_right_share"] == 1 / 3
    assert result["invented names / other", "wrong_share"] == 1
    assert result["small talk", "right_share"] == 1


def test_shares_have_exact_intervals():
    from scipy.stats import binomtest

    records = [question(f"What is {i}?", "Yes.") for i in range(20)]
    metric = measure_facts(records, answering(["Yes."] * 13 + ["No."] * 7)).metrics[0]
    expected = binomtest(13, 20).proportion_ci(method="exact")
    assert (metric.count, metric.estimate.value) == (20, 0.65)
    assert metric.estimate[1:] == pytest.approx((expected.low, expected.high))


def test_built_in_records():
    facts = chat_tasks.python_chat_records()
    assert {record["kind"].partition(" / ")[0] for record in facts.records} == {"facts", "invented names", "small talk"}
    perfect = values(measure_facts(facts.records, answering([record["answer"] for record in facts.records])))
    assert perfect["all", "right_share"] == perfect["all", "invented_right_share"] == 1
    instructions = chat_tasks.instruction_records().records
    assert len(instructions) == len({record["prompt"] for record in instructions}) == 40
    assert {check["check"] for record in instructions for check in record["checks"]} == set(CHECKS)
    assert json.loads(json.dumps(facts.records + instructions))  # the form of a file of one's own
    empty = values(measure_instructions(instructions, answering([" "] * len(instructions))))
    assert set(empty.values()) == {0.0}


@pytest.mark.parametrize(
    "records",
    [
        [{"messages": "Hi", "answer": "Hello"}],
        [{"messages": [], "answer": "Hello"}],
        [{"messages": [{"role": "assistant", "content": "Hi"}], "answer": "Hello"}],
        [{"messages": [{"role": "user"}], "answer": "Hello"}],
        [question("Hi", "Hello"), {"messages": [{"role": "user", "content": "Hi"}], "answer": 3}],
    ],
)
def test_malformed_records_are_named(records):
    with pytest.raises(UserError, match=f"^record {len(records)}: "):
        measure_facts(records, answering(["Hello"] * len(records)))


# (text, check, value, whether it is satisfied), decided by hand.
CASES = [
    ("It's a well-known fact.", "words", 4, True),
    ("Blue sky, 24 hours", "max_words", 3, False),
    ("Blue sky, 24 hours", "min_words", 4, True),
    ("One. Two! Three? 3.5 is a number", "sentences", 3, True),
    ("No end", "sentences", 1, False),
    ("- a\n- b\n  * c", "bullets", 3, True),
    ("-a\n- b", "bullets", 2, False),
    ("One.\n\nTwo.\n \nThree.", "paragraphs", 3, True),
    ("  Dear friend, hi", "starts_with", "Dear friend", True),
    ("That is all. ", "ends_with", "That is all.", True),
    ("that is all", "ends_with", "That is all.", False),
    ("Rivers and a River.", "contains", "river", True),
    ("Rivers only", "contains", "river", False),
    ("Rivers only", "excludes", "river", True),
    ("a river", "excludes", "river", False),
    ("all small 1!", "case", "lower", True),
    ("12!", "case", "lower", False),
    ("LOUD 1", "case", "upper", True),
    ("a, b", "no_commas", True, False),
    ('{"name": 1}', "json", "object", True),
    ("[1]", "json", "object", False),
    ("[1]", "json", "array", True),
    ("3", "json", "array", False),
    ("{name}", "json", "object", False),
]


def test_constraints():
    assert {name for _, name, _, _ in CASES} == set(CHECKS)
    for text, name, value, expected in CASES:
        assert satisfied(text, {"check": name, "value": value}) is expected, (text, name)
        assert not satisfied(" \n", {"check": name, "value": value})
    for name in ("rhymes", ["words"], None):
        with pytest.raises(UserError, match="unknown check"):
            satisfied("text", {"check": name, "value": 1})
    invalid = [("words", None), ("max_words", "three"), ("bullets", True), ("excludes", None), ("contains", "")]
    for name, value in [*invalid, ("case", "title"), ("no_commas", False), ("no_commas", 1), ("json", "number")]:
        with pytest.raises(UserError, match=f"check {name}: .* is not a value for it"):
            satisfied("text", {"check": name, "value": value})


def test_instructions_are_scored_as_a_naive_loop_does():
    records = [{"prompt": prompt, "checks": list(checks)} for prompt, checks in INSTRUCTIONS]
    texts = ["sky", "- a\n- b\n- dog, bird", "Yes. Thank you.", '{"name": "city"}', "A river."] * 8
    result = values(measure_instructions(records, answering(texts)))
    prompts = 0
    checks = 0
    total = 0
    for record, text in zip(records, texts, strict=True):
        hits = [satisfied(text, check) for check in record["checks"]]
        prompts += min(hits)
        checks += sum(hits)
        total += len(hits)
    assert 0 < prompts < checks < total
    assert result["all", "prompt_share"] == pytest.approx(prompts / len(records))
    assert result["all", "check_share"] == pytest.approx(checks / total)
    for malformed in ([], "words", [3]):
        with pytest.raises(UserError, match="record 1: checks is not a list such as"):
            measure_instructions([{"prompt": "Hi", "checks": malformed}], answering(["text"]))


def test_replies_in_batches_are_those_one_by_one(monkeypatch):
    """Greedy replies equal those of the float64 model, one token at a time; the stop id is not part of the text."""
    tokenizer = HybridTokenizer()
    tokenizer.add_text("The old cat sat on a mat. What does it do? I do not know cats.\n" * 20)
    tokenizer.freeze_vocab(vocab_size=340)
    model = tiny_model(tokenizer.vocab_size, depth=1, scale=3.0)
    naive = NaiveModel(model)
    template = ChatTemplate.of(tokenizer)
    conversations = [
        (Message("user", "The old cat sat?" * count), Message("assistant", "I do not know."), Message("user", text))
        for count, text in enumerate(("What?", "cats", "A mat. Do cats sit?", "old"), start=1)
    ]
    monkeypatch.setattr(replies, "_BATCH", 3)
    given = Replier(model, tokenizer, context=256, max_tokens=6).reply(conversations[::-1] + conversations[:1])
    assert given[-1] == given[3]
    for conversation, reply in zip(conversations, given[3::-1], strict=True):
        ids = template.encode(conversation, generation_prompt=True).ids.tolist()
        first = len(ids)
        while len(ids) < first + 6 and not (len(ids) > first and ids[-1] in template.stop_ids):
            ids.append(int(np.argmax(naive.logits(ids)[-1])))
        ended = ids[-1] in template.stop_ids
        own = ids[first : len(ids) - ended]
        special = sum(tokenizer.id2token[id_] in TURN_TOKENS for id_ in own)
        assert reply == Reply(tokenizer.decode(own), ended, special, len(ids) - first)


def test_tokens_of_roles_are_counted_and_case_marks_are_not(monkeypatch):
    tokenizer = HybridTokenizer()
    tokenizer.add_text("The old cat sat on a mat.\n" * 20)
    tokenizer.freeze_vocab(vocab_size=340)
    user, assistant, end = (tokenizer.token2id[f"<|{name}|>"] for name in ("user", "assistant", "end"))
    text = tokenizer.encode("The OLD cat")
    assert any(not tokenizer.token_bytes[id_] for id_ in text)  # a case mark
    rows = [[*text, end], [*text, user, *text, assistant, *text]]
    monkeypatch.setattr(replies, "generate_ids", lambda model, prompts, *_, **__: rows[: len(prompts)])
    monkeypatch.setattr(replies, "_BATCH", 2)
    given = Replier(None, tokenizer, context=32).reply([(Message("user", "a"),), (Message("user", "The cat"),)])
    assert given == [
        Reply("The OLD cat", True, 0, len(text) + 1),
        Reply("The OLD cat" * 3, False, 2, 3 * len(text) + 2),
    ]


def test_format_counts_turns_that_end_and_foreign_roles():
    given = [Reply("Yes.", True, 0, 3), Reply("Yes. No", False, 2, 9), Reply(" ", True, 0, 2), Reply("No.", True, 1, 4)]
    result = values(measure_format([question("Hi", "")] * 4, lambda conversations: given))
    assert result == {
        ("all", "ended_share"): 3 / 4,
        ("all", "clean_share"): 2 / 4,
        ("all", "text_share"): 3 / 4,
        ("all", "tokens"): 18 / 4,
    }
