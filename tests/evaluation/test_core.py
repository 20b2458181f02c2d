"""CORE against a slow implementation: one prompt at a time, NumPy logits, loops."""

import csv
import http.server
import json
import os
import random
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from slm_jax.evaluation import core, core_bundle
from slm_jax.evaluation.core_bundle import CoreTask, check_path, open_bundle, read_tasks
from slm_jax.evaluation.intervals import centered_mean_interval
from slm_jax.evaluation.scoring import Scorer
from slm_jax.utils.errors import UserError
from tests.data.hub_server import Hub
from tests.evaluation.naive import NaiveModel
from tests.helpers import learned_tokenizer, tiny_model

CONTEXT = 64
TASKS = """
icl_tasks:
- label: choices
  dataset_uri: folder/choices.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
- label: zero_shot
  dataset_uri: folder/choices.jsonl
  num_fewshot: [0]
  icl_task_type: multiple_choice
- label: pronouns
  dataset_uri: schema.jsonl
  num_fewshot: [1]
  icl_task_type: schema
- label: words
  dataset_uri: words.jsonl
  num_fewshot: [3]
  icl_task_type: language_modeling
  has_categories: false
"""
CHOICES = [
    {"query": f"The cat {i} sat on", "choices": ["a mat", "the dog", f"a mat {i}"][: 2 + i % 2], "gold": i % 2}
    for i in range(7)
]
SCHEMA = [
    {"context_options": [f"The cat {i} ran", f"Dogs {i} ran"], "continuation": "and sat.", "gold": i % 2}
    for i in range(5)
]
WORDS = [{"context": f" The old cat {i} sat on a ", "continuation": "cat" if i % 2 else "mat, ran"} for i in range(6)]
BASELINES = {"choices": 41.7, "zero_shot": 41.7, "pronouns": 50, "words": 0, "another": 25}


def write_bundle(folder):
    files = {"folder/choices.jsonl": CHOICES, "schema.jsonl": SCHEMA, "words.jsonl": WORDS}
    for name, records in files.items():
        path = folder / "eval_data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "core.yaml").write_text(TASKS)
    with (folder / "eval_meta_data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Eval Task", "Task Category", "Random baseline"])
        writer.writerows([name, "x, y", value] for name, value in BASELINES.items())
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("core") / "eval_bundle")


@pytest.fixture(scope="module")
def tokenizer():
    return learned_tokenizer(
        [f"The old cat {i} sat on a mat; the dogs ran.\nAnswer: a mat {i * 7 % 13}.\n" for i in range(60)], 330
    )


def test_prompts_are_those_of_the_reference():
    """The strings that nanochat's templates render."""
    task = CoreTask("choices", "", "multiple_choice", 1, "\nAnswer: ", 0.0)
    shot, record = (
        {"query": "Q1 ", "choices": ["x", "y"], "gold": 1},
        {"query": "Q2", "choices": ["a", " b"], "gold": 0},
    )
    assert core.render(task, record, [shot]).texts == [
        "Q1 \nAnswer: y\n\nQ2\nAnswer: a",
        "Q1 \nAnswer: y\n\nQ2\nAnswer:  b",
    ]
    assert core.render(task, record, []).texts == ["Q2\nAnswer: a", "Q2\nAnswer:  b"]
    task = task._replace(kind="schema", delimiter=" ")
    shot = {"context_options": ["c0", "c1"], "continuation": "end.", "gold": 0}
    record = {"context_options": ["He", "She "], "continuation": "won.", "gold": 1}
    assert core.render(task, record, [shot, shot]).texts == [
        "c0 end.\n\nc0 end.\n\nHe won.", "c0 end.\n\nc0 end.\n\nShe  won.",
    ]  # fmt: skip
    task = task._replace(kind="language_modeling", delimiter=" ")
    shot, record = {"context": " one\n", "continuation": "two "}, {"context": "three ", "continuation": "four"}
    assert core.render(task, record, [shot]).texts == ["one two \n\nthree", "one two \n\nthree four"]


def naive_core(tasks, tokenizer, model, limit):
    """Return CORE and the accuracy of each task."""
    accuracies = {}
    for task, records in tasks:
        records = list(records)
        random.Random(1337).shuffle(records)
        records = records[:limit]
        hits = []
        for i, record in enumerate(records):
            shots = random.Random(1234 + i).sample([j for j in range(len(records)) if j != i], task.shots)
            prompts = core.render(task, record, [records[j] for j in shots]).texts
            ids = [[tokenizer.eos_id, *tokenizer.encode(text)] for text in prompts]
            if task.kind == "language_modeling":
                without, complete = ids
                assert complete[: len(without)] == without
                excess = max(len(complete) - CONTEXT, 0)
                hits.append(model.greedy(complete[excess:], len(without) - excess))
                continue
            step = 1 if task.kind == "multiple_choice" else -1
            common = 0
            while len({tuple(each[::step][: common + 1]) for each in ids}) == 1:
                common += 1
            means = []
            for each in ids:
                first = common if step == 1 else len(each) - common
                excess = max(len(each) - CONTEXT, 0)
                means.append(model.total(each[excess:], first - excess) / (len(each) - first))
            hits.append(int(np.argmax(means)) == record["gold"])
        accuracies[task.label] = np.mean(hits)
    centered = [(accuracies[task.label] - task.baseline) / (1 - task.baseline) for task, _ in tasks]
    return np.mean(centered), accuracies


@pytest.mark.parametrize("limit", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_core_matches_one_prompt_at_a_time(bundle, tokenizer, limit, monkeypatch):
    monkeypatch.setattr(core, "_QUESTIONS", 3)  # several parts
    model = tiny_model(tokenizer.vocab_size, depth=1, scale=3.0)
    tasks = read_tasks(open_bundle(str(bundle)))
    ready = [(task, core.shuffled(records, limit)) for task, records in tasks]
    scorer = Scorer(model, CONTEXT, batch_tokens=1024)
    result = core.measure_core(ready, tokenizer, scorer.score, CONTEXT)
    metrics = {(metric.group, metric.name): metric for metric in result.metrics}
    expected, accuracies = naive_core(tasks, tokenizer, NaiveModel(model), limit or None)
    assert metrics["all", "core"].estimate.value == pytest.approx(expected)
    for label, accuracy in accuracies.items():
        assert metrics[label, "accuracy"].estimate.value == pytest.approx(accuracy)
        assert metrics[label, "accuracy"].count == min(limit or 9, len({t.label: r for t, r in tasks}[label]))
    assert "which are not the 22 of the paper" in result.note
    assert ("lost their beginning" in result.note) == any(
        len(tokenizer.encode(text)) >= CONTEXT
        for task, records in ready for i in range(len(records))
        for text in core.render(task, records[i], core.examples(records, i, task.shots)).texts
    )  # fmt: skip
    # Items that do not count leave the prompts of the others as they are.
    keep = np.arange(sum(len(records) for _, records in ready)) % 2 == 0
    half = core.measure_core(ready, tokenizer, scorer.score, CONTEXT, keep)
    hits = np.concatenate([core.answers(*each, tokenizer, scorer.score, CONTEXT)[0] for each in ready])
    assert half.metrics[1].estimate.value == hits[: len(ready[0][1])][::2].mean()


@pytest.mark.parametrize("complete", [[5, 9, 7], [5, 6]], ids=["other tokens", "no token more"])
def test_a_continuation_that_changes_the_tokens_of_its_prompt_is_scored_alone(tokenizer, complete):
    """The prompt is [5, 6]; with its continuation the tokens do not begin with these, or are no more."""
    prompts = core.Prompts(["a", "a b"], "language_modeling")
    ids = [np.array([5, 6], np.int32), np.array(complete, np.int32)]
    (item,) = core.prompt_items(prompts, ids, np.array([8, 4], np.int32), tokenizer)
    assert item.ids.tolist() == [tokenizer.eos_id, 5, 6, 8, 4]
    assert item.first == 3
    ids[1] = np.array([5, 6, 7], np.int32)
    (item,) = core.prompt_items(prompts, ids, np.array([8, 4], np.int32), tokenizer)
    assert (item.ids.tolist(), item.first) == ([tokenizer.eos_id, 5, 6, 7], 3)


def test_a_long_prompt_loses_its_beginning_and_keeps_what_is_scored():
    item = core.Item(np.arange(100), 97)
    assert core.cropped(item, 200) is item
    short = core.cropped(item, 10)
    assert short.ids.tolist() == list(range(90, 100))
    assert short.first == 7


def test_the_interval_is_that_of_resampled_items():
    counts = [(3, 10, 0.25), (40, 50, 0.0), (9, 20, 0.5)]
    hits = [np.arange(n) < k for k, n, _ in counts]
    random_numbers = np.random.default_rng(5)
    means = []
    for _ in range(4000):
        accuracies = [random_numbers.choice(each, each.size).mean() for each in hits]
        means.append(np.mean([(a - b) / (1 - b) for a, (_, _, b) in zip(accuracies, counts, strict=True)]))
    estimate = centered_mean_interval(counts)
    assert estimate.value == pytest.approx(np.mean([0.05 / 0.75, 0.8, -0.1]))
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.02)


def test_a_zip_file_is_downloaded_once(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for path in sorted(bundle.rglob("*")):
            archive.write(path, path.relative_to(bundle.parent))
    expected = read_tasks(open_bundle(str(bundle)))
    assert read_tasks(open_bundle(str(tmp_path / "bundle.zip"))) == expected
    data = (tmp_path / "bundle.zip").read_bytes()
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(core_bundle, "BUNDLE_URL", f"http://127.0.0.1:{server.server_port}/eval_bundle.zip")
    assert [read_tasks(open_bundle("")) for _ in range(2)] == [expected, expected]
    server.shutdown()
    server.server_close()
    assert requests == ["/eval_bundle.zip"]
    assert "sha256" in open_bundle("").origin
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"core needs the network, but http://127.0.0.1.*--tasks core=DIR"):
        open_bundle("")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("core.yaml", "icl_tasks: 3", "core.yaml of .* is malformed"),
        ("core.yaml", "- [", r"^core.yaml of .* is malformed: [^\n]*$"),
        ("core.yaml", TASKS.replace("[3]", "[-1]"), "words has num_fewshot -1: should be 0 or more"),
        ("eval_data/words.jsonl", b"\xff\n", "words.jsonl is not UTF-8 text"),
        ("core.yaml", TASKS.replace("schema\n", "other\n"), "pronouns has the type other; expected one of"),
        ("core.yaml", TASKS.replace("label: words", "label: unknown"), "unknown has no random baseline"),
        ("core.yaml", TASKS.replace("schema.jsonl", "../../secret.jsonl"), "names a file outside of it"),
        ("eval_meta_data.csv", "a,b\n1,2\n", "eval_meta_data.csv of .* is malformed"),
        ("eval_data/schema.jsonl", '{"context_options": [], "continuation": "a", "gold": 0}\n', "line 1 .*gold 0 of 0"),
        ("eval_data/words.jsonl", '{"context": "a"}\n', "words.jsonl line 1 is malformed: 'continuation'"),
        ("eval_data/words.jsonl", "\n", "words.jsonl has no records"),
    ],
)
def test_a_malformed_bundle_is_reported(tmp_path, file, text, message):
    folder = write_bundle(tmp_path / "bundle")
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_tasks(open_bundle(str(folder)))


@pytest.mark.parametrize(("path", "message"), [("none", "neither"), (".", "no core.yaml"), ("hf:a", "hf:OWNER/NAME")])
def test_a_path_without_a_bundle_is_reported(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        check_path(path)


PROGRAM = """
from slm_jax.evaluation.core_bundle import open_bundle, read_tasks
bundle = open_bundle("hf:owner/bundle")
print([(task.label, len(records)) for task, records in read_tasks(bundle)], bundle.origin, flush=True)
import os; os._exit(0)
"""


@pytest.mark.slow  # starts a process, which imports everything
def test_a_bundle_on_the_hub(tmp_path):
    pytest.importorskip("huggingface_hub")
    write_bundle(tmp_path / "hub" / "owner" / "bundle")
    served = Hub(tmp_path / "hub")
    variables = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment = variables | {
        "HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_TOKEN": "",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, text=True, capture_output=True, check=False)
    served.close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "[('choices', 7), ('zero_shot', 7), ('pronouns', 5), ('words', 6)] hf:owner/bundle at 0123456789"
    )
