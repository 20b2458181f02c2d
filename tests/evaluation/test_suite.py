"""`evaluate` and its command on a run: results, their storage, messages, and tasks that cannot be measured."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from slm_jax.cli.evaluate import describe_tasks, main
from slm_jax.config.schema import Config
from slm_jax.data.prepare import prepare
from slm_jax.data.sources import hub
from slm_jax.evaluation import datasets, evaluate, suite
from slm_jax.evaluation.datasets import HubLocation
from slm_jax.evaluation.loading import subset
from slm_jax.run.checkpoint import Checkpoints
from slm_jax.run.directory import Run
from slm_jax.run.results import update_evaluation
from slm_jax.training.steps import make_steps
from slm_jax.utils.errors import UserError
from tests.data.hub_server import Hub
from tests.evaluation.test_core import write_bundle
from tests.helpers import TINY

PAIRS = [
    {"sentence_good": f"The cat {i} sat.", "sentence_bad": f"The cat sat {i}.", "UID": f"p{i % 2}", "field": "syntax",
     "linguistics_term": "order"}
    for i in range(12)
]  # fmt: skip
PASSAGES = [{"text": f"The old cat {i} sat on a mat"} for i in range(9)]


def write_jsonl(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of one step in runs/tiny, and data sets."""
    path = tmp_path_factory.mktemp("suite")
    texts = ["".join(f"The old cat {i} sat on mat {i * k % 13}.\n" for i in range(30)) for k in range(40)]
    (path / "text.txt").write_text("<|endoftext|>\n".join(texts))
    options = TINY | {"model.depth": 1, "train.steps": 1, "optimizer.warmup_steps": 0, "eval.sample_tokens": 0}
    options |= {
        "optimizer.name": "adamw",
        "tokenizer.vocab_size": 320,
        "eval.max_tokens": 200,
        "data.validation_fraction": 0.2,
    }
    options |= {"data.files": (str(path / "text.txt"),), "data.cache": str(path / "cache")}
    config = Config.load(**options)
    run = Run(path / "runs" / "tiny")
    with run.lock():
        run.begin(config)
        tokenizer, _ = prepare(config, run)
        with Checkpoints(run.checkpoints, config.checkpoint) as checkpoints:
            checkpoints.save(1, make_steps(config, tokenizer.vocab_size).init(), {"step": 1})
    write_jsonl(path / "blimp.jsonl", PAIRS)
    write_jsonl(path / "lambada.jsonl", PASSAGES)
    (path / "words.txt").write_text(": one\ncat cats dog dogs\nmat mats cat cats\n")
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch, folder, tmp_path):
    """No network (unless a test starts a hub), and an empty cache."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")  # an address reserved for documentation
    monkeypatch.setattr(hub, "CONNECT_TIMEOUT", 0.2)
    (folder / "runs" / "tiny" / "evaluation.json").unlink(missing_ok=True)


def stored(folder):
    return json.loads((folder / "runs" / "tiny" / "evaluation.json").read_text())


def test_results_are_stored_and_replaced_when_measured_again(folder):
    tasks = ["heldout", "blimp=blimp.jsonl,lambada=lambada.jsonl", "analogies=words.txt", "heldout:own=text.txt"]
    evaluation = evaluate("runs/tiny", tasks, context=32)
    assert not evaluation.missing
    file = stored(folder)
    assert file["results"] == evaluation.rows
    assert {row["task"] for row in evaluation.rows} == {"heldout", "blimp", "lambada", "analogies", "heldout:own"}
    for row in evaluation.rows:
        assert row.keys() - {"reference"} == {
            "task",
            "group",
            "metric",
            "value",
            "low",
            "high",
            "count",
            "step",
            "time",
        }
        assert row["step"] == 1
        if row["low"] is not None:
            assert row["low"] <= row["value"] <= row["high"]
    hits = evaluation.value("blimp", "accuracy") * 12
    assert hits == pytest.approx(round(hits))
    assert 0 < evaluation.value("heldout", "bits_per_byte") < 8
    assert file["tasks"]["blimp"]["data"] == "blimp.jsonl"
    assert file["tasks"]["heldout"]["dtype"] == "float32"

    before = {row["task"]: row for row in evaluation.rows}
    few = evaluate("runs/tiny", ["analogies=words.txt"], max_items=1, save=False)
    assert {row["count"] for row in few.rows} == {1}
    again = evaluate("runs/tiny", ["lambada=lambada.jsonl"], max_items=4)
    assert {row["count"] for row in again.rows} == {4}
    now = stored(folder)["results"]
    others = [row for row in evaluation.rows if row["task"] != "lambada"]
    assert [row for row in now if row["task"] != "lambada"] == others
    assert [row for row in now if row["task"] == "lambada"] == again.rows
    assert before["lambada"] not in now
    assert evaluate("runs/tiny", ["lambada=lambada.jsonl"], save=False).rows
    assert stored(folder)["results"] == now


def test_the_command_prints_a_table_and_continues_without_a_network(folder, capsys, caplog):
    main(["--run", "runs/tiny"])
    out, err = capsys.readouterr()
    assert "bits_per_byte" in out
    assert " – " in out
    assert caplog.text.count("cannot be reached") == 2  # once per task; the connection is tried once
    assert "Without a network: --tasks blimp=FILE (JSONL or Parquet with the columns sentence_good, sent" in caplog.text
    assert "Without a network: --tasks lambada=FILE (JSONL or Parquet with the column text)" in caplog.text
    assert err.endswith("\nnot measured: blimp, lambada (see above)\n")
    with pytest.raises(UserError, match=r"^not measured: piqa \(see above\)$"):
        main(["--run", "runs/tiny", "--tasks", "piqa", "blimp=blimp.jsonl", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert {row["task"] for row in shown["results"]} == {"blimp"}
    assert list(shown["missing"]) == ["piqa"]


def test_core_is_measured_on_the_first_items_of_each_task(folder, capsys):
    write_bundle(folder / "bundle")
    main(["--run", "runs/tiny", "--tasks", "core=bundle", "--limit", "2"])
    assert "core=bundle" not in capsys.readouterr().err
    rows = stored(folder)["results"]
    assert rows[0]["metric"] == "core"
    assert {row["count"] for row in rows[1:]} == {2}
    assert suite.unmeasured_tasks(Run(folder / "runs" / "tiny"), ["core=bundle"]) == ["core=bundle"]  # not of all items
    with pytest.raises(UserError, match="--limit 2 and --max_items 3 are the same option"):
        main(["--limit", "2", "--max_items", "3"])


def test_all_prints_the_smallest_groups(capsys):
    main(["--run", "runs/tiny", "--tasks", "blimp=blimp.jsonl"])
    assert "syntax / order / p1" not in capsys.readouterr().out
    main(["--run", "runs/tiny", "--tasks", "blimp=blimp.jsonl", "--all"])
    assert "syntax / order / p1" in capsys.readouterr().out


def test_list_describes_every_task(capsys):
    main(["--tasks", "list"])
    text = capsys.readouterr().out
    assert text.strip() == describe_tasks()
    for name in (
        "heldout",
        "blimp",
        "lambada",
        "analogies",
        "hellaswag",
        "piqa",
        "arc_easy",
        "arc_challenge",
        "choices",
    ):
        assert f"  {name}" in text


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["blmp"], r"unknown task blmp .*; did you mean blimp\?"),
        (["analogies"], "analogies needs a file: analogies=FILE"),
        (["blimp=none.jsonl"], "--tasks blimp=none.jsonl: no file matches none.jsonl"),
        (["lambada", "lambada=lambada.jsonl"], "lambada is given twice"),
        (["blimp:a"], "blimp:a needs a file"),
        (["blimp="], "--tasks blimp=: the path of the file is empty"),
        ([""], "--tasks names no task: give some of heldout"),
        ([","], "--tasks names no task"),
    ],
)
def test_invalid_tasks_raise_before_anything_is_measured(tasks, message):
    with pytest.raises(UserError, match=message):
        evaluate("runs/tiny", tasks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "A b"}\n{"other": 1}\n', r"bad.jsonl line 2: column text is missing \(columns: other\)"),
        ("[1]\n", "line 1: a record is not an object"),
        ('{"text": null}\n', r"bad.jsonl line 1: column text is empty \(null\) \(columns: text\)"),
        ("\n", "bad.jsonl has no records"),
        ('{"text": "Word"}\n', "only one word"),
        ('{"text": 5}\n', "record 1: text is not text: 5"),
    ],
)
def test_a_task_with_invalid_records_is_missing_with_the_reason(folder, text, message):
    (folder / "bad.jsonl").write_text(text)
    evaluation = evaluate("runs/tiny", ["lambada=bad.jsonl", "blimp=blimp.jsonl"], save=False)
    assert list(evaluation.missing) == ["lambada"]
    assert {row["task"] for row in evaluation.rows} == {"blimp"}
    with pytest.raises(UserError, match=message):
        raise UserError(evaluation.missing["lambada"])


@pytest.mark.parametrize(
    "text", ['{"results": [', '{"results": [3]}', '{"results": [{"a": 3}]}', '{"results": [], "tasks": {"blimp": 3}}']
)
def test_a_damaged_results_file_raises_before_anything_is_measured(folder, text, monkeypatch):
    monkeypatch.setattr(suite, "Scorer", None)
    (folder / "runs" / "tiny" / "evaluation.json").write_text(text)
    with pytest.raises(UserError, match=r"evaluation.json is damaged .*remove it"):
        evaluate("runs/tiny", ["blimp=blimp.jsonl"])


def test_concurrent_evaluations_keep_the_results_of_each_other(folder):
    run = Run(folder / "runs" / "tiny")

    def write(i):
        for step in range(5):
            update_evaluation(run.path, f"task {i}", [{"task": f"task {i}", "value": step}], {"step": step})

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(8)))
    file = stored(folder)
    assert sorted((row["task"], row["value"]) for row in file["results"]) == [(f"task {i}", 4) for i in range(8)]
    assert sorted(file["tasks"]) == [f"task {i}" for i in range(8)]


def test_results_that_cannot_be_stored_are_returned(folder, caplog, capsys, monkeypatch):
    """A run of somebody else, which is read-only, can be measured, and one on a full disk."""
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as context:
        context.setattr("slm_jax.run.results.replace_text", Mock(side_effect=no_space))
        assert evaluate("runs/tiny", ["blimp=blimp.jsonl"]).rows
        with pytest.raises(UserError, match=r"^not stored: blimp \(see above\)$"):
            main(["--run", "runs/tiny", "--tasks", "blimp=blimp.jsonl"])
    assert "accuracy" in capsys.readouterr().out  # the table comes first
    assert "blimp: measured, but not stored: no space left on the disk" in caplog.text
    lock = folder / "runs" / "tiny" / ".evaluation.lock"
    lock.unlink()
    lock.mkdir()
    measured = evaluate("runs/tiny", ["blimp=blimp.jsonl"])
    lock.rmdir()
    assert measured.rows
    assert not measured.missing
    assert measured.unstored == {"blimp": "cannot write runs/tiny/evaluation.json: Is a directory"}
    assert "blimp: measured, but not stored: cannot write runs/tiny/evaluation.json: Is a directory" in caplog.text


def test_results_stored_by_another_process_in_between_are_kept(folder, monkeypatch):
    @contextlib.contextmanager
    def meanwhile(_):
        update_evaluation(folder / "runs" / "tiny", "other", [{"task": "other"}], {})
        yield

    monkeypatch.setattr(suite, "waiting", meanwhile)
    evaluate("runs/tiny", ["blimp=blimp.jsonl"])
    assert set(stored(folder)["tasks"]) == {"other", "blimp"}


@pytest.mark.parametrize(
    ("options", "task", "remaining"),
    [
        ({}, "blimp=blimp.jsonl", []),
        ({}, "blimp=other.jsonl", ["blimp=other.jsonl"]),
        ({}, "blimp", ["blimp"]),
        ({}, "blimp:b=blimp.jsonl", ["blimp:b=blimp.jsonl"]),
        ({"max_items": 3}, "blimp=blimp.jsonl", ["blimp=blimp.jsonl"]),
        ({"context": 8}, "blimp=blimp.jsonl", ["blimp=blimp.jsonl"]),
    ],
)
def test_unmeasured_tasks(folder, options, task, remaining):
    """A task is measured again if its data set differs, or if it was not measured with the default options."""
    write_jsonl(folder / "other.jsonl", PAIRS[:5])
    evaluate("runs/tiny", ["blimp=blimp.jsonl"], **options)
    assert suite.unmeasured_tasks(Run(folder / "runs" / "tiny"), [task]) == remaining


def test_all_invalid_numbers_are_reported_together():
    with pytest.raises(UserError, match="--max_items -1 must be 0 or more; --batch_tokens -2 must be 0 or more"):
        main(["--max_items", "-1", "--batch_tokens", "-2"])


def test_a_subset_is_spread_and_deterministic():
    numbers = list(range(1000))
    chosen = subset(numbers, 50)
    assert chosen == subset(numbers, 50) == sorted(set(chosen))
    assert len(chosen) == 50
    assert chosen[-1] > 800
    assert subset(numbers, 0) is numbers


PROGRAM = """
import sys
from slm_jax.evaluation.registry import TASKS
from slm_jax.evaluation.datasets import HubLocation, HubLoader
hub = HubLoader()
task = TASKS["blimp"]
for _ in range(2):
    dataset = hub.load("blimp", HubLocation(task.hub.repo, "train", ("p0", "p1")), task.columns)
    print([row["UID"] for row in dataset.records], dataset.origin)
print(len(hub.load("lambada", TASKS["lambada"].hub, ("text",)).records))
sys.stdout.flush()
import os; os._exit(0)
"""


@pytest.mark.slow  # starts a process, which imports everything
def test_hub_data_sets_are_downloaded_once(tmp_path):
    """With the real libraries and a local server, in a process that has not imported them yet."""
    pytest.importorskip("datasets")
    for name in ("p0", "p1"):
        pairs = [pair for pair in PAIRS if pair["UID"] == name]
        write_jsonl(tmp_path / "hub" / "nyu-mll" / "blimp" / name / "train.jsonl", pairs)
    configs = "".join(f"- config_name: {n}\n  data_files:\n  - split: train\n    path: {n}/*\n" for n in ("p0", "p1"))
    (tmp_path / "hub" / "nyu-mll" / "blimp" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    write_jsonl(tmp_path / "hub" / "EleutherAI" / "lambada_openai" / "data" / "test.jsonl", PASSAGES)
    served = Hub(tmp_path / "hub")
    variables = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment = variables | {
        "HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(hub.__file__).parents[3]), "HF_TOKEN": "",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, text=True, capture_output=True, check=False)
    served.close()
    assert done.returncode == 0, done.stderr
    first, second = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert first.startswith(str(["p0"] * 6 + ["p1"] * 6))
    assert "nyu-mll/blimp at 0123456789" in first
    assert second.startswith(first)
    assert "(kept in " in second
    assert done.stdout.splitlines()[-1] == "9"


def test_an_unreachable_hub_is_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(
        datasets, "check_reachable", lambda name, remedy: tried.append(name) or hub.check_reachable(name, remedy)
    )
    loader = datasets.HubLoader()
    for task in ("blimp", "lambada"):
        with pytest.raises(UserError, match=f"^{task} needs the network"):
            loader.load(task, HubLocation("a/b", "test"), ("text",))
    assert tried == ["blimp"]


def test_a_damaged_cached_copy_raises(tmp_path):
    folder = tmp_path / "cache" / "slm_jax" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "a--b--test--blimp.jsonl.gz").write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(UserError, match=r"blimp.jsonl.gz is damaged .*remove it"):
        datasets.HubLoader().load("blimp", HubLocation("a/b", "test"), ("text",))
