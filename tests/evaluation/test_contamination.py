"""Contaminated items against an intersection of sets, and their scores in a run."""

import json

import numpy as np
import pytest

from slm_jax.evaluation import contamination, evaluate
from slm_jax.evaluation.contamination import NGRAM, find_contamination, words_of
from slm_jax.evaluation.item_texts import chat_pieces, core_pieces, record_pieces
from slm_jax.evaluation.registry import TASKS
from slm_jax.report.page import write_report
from slm_jax.run.results import read_evaluation
from slm_jax.utils.errors import UserError
from tests.evaluation.test_suite import folder, no_network  # noqa: F401
from tests.report.pages import read_page


def grams(text):
    words = words_of(text)
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def test_words_are_in_lower_case_without_punctuation():
    assert words_of("It's  a Well-known\n“FACT”, isn't it? Ünï_1 …") == "its a wellknown fact isnt it ünï_1".split()


def test_against_an_intersection_of_sets():
    random = np.random.default_rng(2)
    for _ in range(20):
        vocabulary = ["the", "Cat,", "sat.", "é", "(dog)", "ran", "\n"]

        def text(size, random=random, vocabulary=vocabulary):
            return " ".join(random.choice(vocabulary, size))

        passages = [text(random.integers(5, 30)) for _ in range(6)]

        def document(random=random, passages=passages, text=text):
            return " ".join([text(9), passages[random.integers(6)], text(random.integers(0, 9))])

        tasks = [[document() for _ in range(5)], [], [text(random.integers(0, 15)) for _ in range(8)]]
        blocks = [[document() for _ in range(4)], [], [text(3)], ["", document()]]
        trained = set().union(*(grams(each) for block in blocks for each in block))
        results = find_contamination([[(each,) for each in texts] for texts in tasks], blocks)
        for texts, result in zip(tasks, results, strict=True):
            assert result.found.tolist() == [bool(grams(each) & trained) for each in texts]
            assert result.num_short == sum(len(words_of(each)) < NGRAM for each in texts)
        # The same texts as pieces of fewer items: an item is found or comparable if one of its pieces is.
        merged = find_contamination([[tuple(texts[:2]), tuple(texts[2:])] for texts in tasks], blocks)
        for result, single in zip(merged, results, strict=True):
            assert result.found.tolist() == [single.found[:2].any(), single.found[2:].any()]
    assert find_contamination([[("a " * 20,)]], [])[0].found.tolist() == [False]


def test_a_question_is_found_with_any_of_its_choices():
    """Each choice with its question, and each sentence of a pair by itself, as training text has them."""
    question = "on which of these things did the old cat of the house sit"
    texts = ["a wrong one", "the right answer is here"]
    trained = [f"So: {question}? The right answer is here!"]
    records = {
        "choices": {"context": question, "choices": texts, "answer": 1},
        "piqa": {"goal": question, "sol1": texts[0], "sol2": texts[1], "label": 1},
        "arc_easy": {"question": question, "choices": {"text": texts, "label": ["A", "B"]}, "answerKey": "B"},
    }
    items = [record_pieces(TASKS[name], record) for name, record in records.items()]
    items.append(core_pieces("multiple_choice", {"query": question, "choices": texts, "gold": 1}))
    items.append(core_pieces("schema", {"context_options": ["no", question], "continuation": texts[1], "gold": 1}))
    assert find_contamination([items], [trained])[0].found.tolist() == [True] * 5
    assert find_contamination([items], [[question]])[0].found.tolist() == [len(words_of(question)) >= NGRAM] * 5

    short = {
        "sentence_good": "The cats of the house sit on mats.",
        "sentence_bad": "The cats of the house sits on mats.",
    }
    long = {column: f"{text} {text}" for column, text in short.items()}
    pairs = [record_pieces(TASKS["blimp"], each) for each in (short, long)]
    joined = " ".join(short.values())  # 16 words, which no training sentence has
    (result,) = find_contamination([pairs], [[joined], [long["sentence_bad"]]])
    assert result.found.tolist() == [False, True]
    assert result.num_short == 1


def test_each_message_of_a_conversation_is_a_text():
    """Words of two turns that follow each other only in the evaluation are no n-gram, and roles are no words."""
    turns = ["one two three four five six seven", "eight nine ten eleven twelve thirteen fourteen"]
    long = "this single message of a user has exactly as many words as it takes"
    record = {"messages": [{"role": "user", "content": turns[0]}, {"role": "assistant", "content": turns[1]}]}
    items = [chat_pieces(each, ("messages", "answer")) for each in (record, record | {"answer": long})]
    assert items == [tuple(turns), (*turns, long)]
    (result,) = find_contamination([items], [[" ".join(turns), f"{turns[0]} assistant {turns[1]}", long]])
    assert result.found.tolist() == [False, True]
    assert result.num_short == 1
    malformed = {"prompt": None, "messages": [1, {"role": "user"}, {"content": ["a"]}]}
    assert chat_pieces(malformed, ("messages", "prompt", "answer")) == ()


def test_items_of_the_training_text_are_found_and_the_others_scored_alone(folder, monkeypatch):  # noqa: F811
    trained = (folder / "text.txt").read_text().splitlines()
    passages = [" ".join(trained[i : i + 3]).upper() for i in range(0, 600, 60)]  # 27 words; some are held out
    mine = [
        {"text": f"Nobody wrote these {i} words anywhere before, so that a search must not find a mat"}
        for i in range(4)
    ]
    records = [{"text": text} for text in passages] + mine
    (folder / "mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "clean.jsonl").write_text("".join(json.dumps(record) + "\n" for record in mine))
    computed = []
    score = contamination.NgramIndex.search
    monkeypatch.setattr(
        contamination.NgramIndex, "search", lambda self, texts: computed.append(1) or score(self, texts)
    )
    evaluation = evaluate("runs/tiny", ["lambada=mixed.jsonl", "heldout"], contamination=True)
    share = evaluation.value("lambada", "contaminated_share")
    assert 0.3 < share <= 10 / 14
    assert {row["count"] for row in evaluation.rows if row["group"] == "clean"} == {14 - round(14 * share)}
    assert "13 consecutive words in common with a training document" in evaluation.tasks["lambada"]["note"]
    assert not [row for row in evaluation.rows if row["task"] == "heldout" and row["metric"] == "contaminated_share"]
    assert computed
    assert read_evaluation(folder / "runs" / "tiny").results == evaluation.rows

    if round(14 * share) == 10:  # all passages are training text: what is left are the others
        alone = evaluate("runs/tiny", ["lambada=clean.jsonl"], save=False)
        assert evaluation.value("lambada", "perplexity", "clean") == pytest.approx(alone.value("lambada", "perplexity"))
    table = read_page(write_report(folder / "runs" / "tiny")[1]).by_id("evaluation").one("table").rows()
    column = table[0].index("clean items")
    assert [row[column] for row in table[1:] if row[0] == "lambada"][:2] != ["", ""]


def test_a_run_without_its_text_is_refused_before_anything_is_measured(folder):  # noqa: F811
    corpus = folder / "runs" / "tiny" / "corpus"
    corpus.rename(corpus.with_name("elsewhere"))
    try:
        with pytest.raises(UserError, match="has no corpus: its training text cannot be searched"):
            evaluate("runs/tiny", ["blimp=blimp.jsonl"], contamination=True)
    finally:
        corpus.with_name("elsewhere").rename(corpus)
