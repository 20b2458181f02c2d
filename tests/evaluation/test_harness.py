"""Our models in EleutherAI's lm-evaluation-harness, with its task formats and evaluator on local data."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from slm_jax.evaluation import harness
from slm_jax.generation.decode import encode_prompt
from slm_jax.run.directory import Run
from slm_jax.run.load import LoadedRun
from slm_jax.utils.errors import UserError
from tests.evaluation.naive import NaiveModel
from tests.helpers import tiny_config, tiny_model
from tokenizer import HybridTokenizer

TEXT = "".join(f"The old cat {i} sat on a mat; dogs ran.\nParis is in France {i * 7 % 13}.\n" for i in range(60))
QUESTIONS = [
    {"question": "The old cat sat on a", "options": ["mat", "dog"], "answer": 0},
    {"question": "Paris is in", "options": ["dogs ran", "France 4", "a cat"], "answer": 1},
    {"question": "cats", "options": [" sit on mats", "ran"], "answer": 1},
]
YAML = """
task: {name}
output_type: {kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
doc_to_text: "{text}"
doc_to_target: "{target}"
"""


@pytest.fixture(scope="module")
def loaded():
    tokenizer = HybridTokenizer()
    tokenizer.add_text(TEXT)
    tokenizer.freeze_vocab(vocab_size=330)
    config = tiny_config(train__sequence_length=32)
    model = tiny_model(tokenizer.vocab_size, depth=1, scale=3.0)
    return LoadedRun(Run(None), config, tokenizer, model, 7)


@pytest.fixture
def adapter(loaded, monkeypatch):
    """The request methods without the harness."""
    monkeypatch.setattr(harness, "load_run", lambda path, step: loaded)
    return harness.HarnessModel("here", batch_size="2")


def instances(*args):
    return [SimpleNamespace(args=each) for each in args]


def total(loaded, context, rest):
    ids = np.array(encode_prompt(loaded.tokenizer, context) + loaded.tokenizer.encode(rest))
    first = len(encode_prompt(loaded.tokenizer, context))
    naive = NaiveModel(loaded.model)
    return naive.total(ids, first), naive.greedy(ids, first)


def test_loglikelihood_matches_the_naive_model(adapter, loaded):
    pairs = [("The old cat", " sat on"), ("", "Paris is"), ("dogs ", "ran.")]
    expected = [total(loaded, "The old cat", " sat on"), total(loaded, "", "Paris is"), total(loaded, "dogs", " ran.")]
    scores = adapter.loglikelihood(instances(*pairs))
    assert [value for value, _ in scores] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]


def test_rolling_loglikelihood_covers_the_text_in_windows(adapter, loaded):
    text = TEXT[:200]
    ids = np.array(encode_prompt(loaded.tokenizer, text))
    assert len(ids) > 2 * 32
    naive = NaiveModel(loaded.model)
    value = 0.0
    end = 0
    done = 0
    while done < len(ids) - 1:
        end = min(len(ids) - 1, max(32, done + 16))
        begin = max(0, end - 32)
        value += naive.total(ids[begin : end + 1], done + 1 - begin)
        done = end
    assert adapter.loglikelihood_rolling(instances((text,), ("The",))) == pytest.approx(
        [value, total(loaded, "", "The")[0]], abs=5e-3
    )


def test_generation_ends_at_a_stop_string(adapter, loaded):
    settings = {"until": [], "max_gen_toks": 12}
    requests = [(prompt, dict(settings)) for prompt in ("The old", "Paris is")]
    texts = adapter.generate_until(instances(*requests))
    for (prompt, _), text in zip(requests, texts, strict=True):
        ids = encode_prompt(loaded.tokenizer, prompt)
        first = len(ids)
        naive = NaiveModel(loaded.model)
        banned = [loaded.tokenizer.token2id[n] for n in ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK>", "<RES>")]
        for _ in range(12):
            row = naive.logprobs([*ids[-32:], 0])[-1]
            row[banned] = -np.inf
            ids.append(int(row.argmax()))
            if ids[-1] == loaded.tokenizer.token2id["<EOS>"]:
                break
        assert text == loaded.tokenizer.decode(ids[first:])
    stop = texts[0][3:5]
    both = [(prompt, {"until": ["never", stop], "max_gen_toks": 12}) for prompt, _ in requests]
    assert adapter.generate_until(instances(*both)) == [text.partition(stop)[0] for text in texts]
    sampled = [(prompt, settings | {"do_sample": True, "temperature": 1.5, "seed": 3}) for prompt, _ in requests]
    drawn = adapter.generate_until(instances(*sampled))
    assert drawn == adapter.generate_until(instances(*sampled)) != texts


def test_generation_settings():
    assert harness._generation_settings({"temperature": 0.0})[0].temperature == 0
    assert harness._generation_settings({"temperature": 0.7, "do_sample": False})[0].temperature == 0
    sampling, max_tokens = harness._generation_settings({"temperature": 0.7, "top_p": 0.9, "max_gen_toks": 5})
    assert (sampling.temperature, sampling.top_p, max_tokens) == (0.7, 0.9, 5)


def test_a_missing_harness_raises(monkeypatch):
    harness.model_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"lm-evaluation-harness is not installed .*pip install -e '\.\[eval\]'"):
        harness.model_class()


@pytest.mark.slow  # importing the harness takes seconds
def test_a_local_harness_task(loaded, monkeypatch, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(harness, "load_run", lambda path, step: loaded)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": TEXT[:k]}) + "\n" for k in (30, 140)))
    (tmp_path / "mine.yaml").write_text(YAML.format(
        name="mine", kind="multiple_choice", file=tmp_path / "rows.jsonl", text="{{question}}", target="{{answer}}"
    ) + 'doc_to_choice: "{{options}}"\nmetric_list:\n  - metric: acc\n')  # fmt: skip
    (tmp_path / "mine_text.yaml").write_text(YAML.format(
        name="mine_text", kind="loglikelihood_rolling", file=tmp_path / "texts.jsonl", text="", target="{{text}}"
    ) + "metric_list:\n  - metric: bits_per_byte\n")  # fmt: skip
    harness.model_class.cache_clear()
    model = harness.SlmJax(run="here")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(model, tasks=["mine", "mine_text"], task_manager=manager, bootstrap_iters=0)
    sums = [[total(loaded, row["question"], f" {option}")[0] for option in row["options"]] for row in QUESTIONS]
    right = [int(np.argmax(each)) == row["answer"] for each, row in zip(sums, QUESTIONS, strict=True)]
    assert results["results"]["mine"]["acc,none"] == pytest.approx(np.mean(right))
    texts = [TEXT[:30], TEXT[:140]]
    nats = sum(model.loglikelihood_rolling(instances(*((text,) for text in texts))))
    size = sum(len(text.encode()) for text in texts)
    assert results["results"]["mine_text"]["bits_per_byte,none"] == pytest.approx(-nats / math.log(2) / size)
    named = lm_eval.simple_evaluate("slm_jax", "run=here", tasks=["mine"], task_manager=manager, bootstrap_iters=0)
    assert named["results"]["mine"]["acc,none"] == results["results"]["mine"]["acc,none"]
