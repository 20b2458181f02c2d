"""Tasks that are scored during training: the same scores as afterwards, and a training that they do not change."""

import json
import os

import jax
import numpy as np
import pytest

from slm_jax.distributed import sharding
from slm_jax.evaluation import evaluate
from slm_jax.evaluation.scoring import Scorer
from slm_jax.run.directory import Run
from slm_jax.run.metrics import read_metrics
from slm_jax.training.steps import make_steps
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError
from tests.helpers import tiny_config
from tests.report.pages import read_page
from tests.runs import saved_arrays, without_clock

PAIRS = [
    {"sentence_good": f"The quick brown fox {i} jumps.", "sentence_bad": f"The quick fox brown jumps {i}."}
    for i in range(9)
]
QUESTIONS = [{"context": "the lazy", "choices": ["dogs", "fox", f"{i}"], "answer": i % 2} for i in range(8)]
TASKS = ("blimp=pairs.jsonl,choices:own=questions.jsonl", "analogies=words.txt")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a text and the data of the tasks, in which the tests work."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = (f"Line {i}: the quick brown fox jumps over {i * 7 % 13} lazy dogs." for i in range(200))
    (folder / "text.txt").write_text("\n".join(lines))
    for name, records in (("pairs", PAIRS), ("questions", QUESTIONS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "words.txt").write_text("fox quick dogs lazy\nline fox jumps dogs\nfox dogs quick lazy\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


def config(steps=12, **fields):
    options = {
        "model__depth": 1,
        "optimizer__name": "adamw",
        "optimizer__schedule": "constant",
        "train__batch_size": 4,
        "tokenizer__vocab_size": 300,
        "data__validation_fraction": 0.2,
        "data__files": ("text.txt",),
        "eval__sample_tokens": 0,
        "eval__every": 6,
        "mesh__data": 1,
        "train__steps": steps,
    }
    return tiny_config(**options | fields)


@pytest.fixture(scope="module")
def scored(workspace):
    """A run with tasks, which was interrupted after its first validation, and continued from another folder."""
    run = workspace / "scored"
    train(config(6, eval__tasks=TASKS), run)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(os.path.sep)
        train(config(12, eval__tasks=Run(run).read_config().eval.tasks), run)
    return run


def task_fields(row):
    return {name: value for name, value in row.items() if name.startswith("task_")}


def test_scores_are_those_of_the_checkpoint_and_training_computes_the_same(workspace, scored):
    train(config(12), workspace / "plain")
    rows, plain = (without_clock(read_metrics(Run(each).metrics)) for each in (scored, workspace / "plain"))
    assert [{k: v for k, v in row.items() if k not in task_fields(row)} for row in rows] == plain
    step, arrays = saved_arrays(scored / "checkpoints")
    _, others = saved_arrays(workspace / "plain" / "checkpoints")
    assert step == 12
    assert all(np.array_equal(arrays[name], others[name]) for name in others)
    assert [row["step"] for row in rows if task_fields(row)] == [6, 12]
    for row in (rows[5], rows[11]):
        evaluation = evaluate(scored, TASKS, step=row["step"], save=False)
        for task, metric in (
            ("blimp", "accuracy"), ("choices:own", "accuracy_norm"), ("analogies", "accuracy_3cosadd"),
        ):  # fmt: skip
            result = next(
                each
                for each in evaluation.rows
                if (each["task"], each["group"], each["metric"]) == (task, "all", metric)
            )
            name = f"task_{task}"
            assert (row[name], row[f"{name}/low"], row[f"{name}/high"]) == tuple(
                result[key] for key in ("value", "low", "high")
            )
    assert rows[11]["task_blimp/chance"] == 0.5
    assert rows[11]["task_choices:own/chance"] == 0.33
    page = read_page(scored / "report.html")
    charts = {each.one("h3").children[0].strip(): each.text for each in page.all("figure", "chart")}
    assert "chance 50" in charts["Task blimp"]
    assert {"Task choices:own", "Task analogies"} <= charts.keys()


@pytest.mark.slow
def test_tasks_have_steps_and_a_number_of_items_of_their_own(workspace, caplog):
    caplog.set_level("INFO", "slm_jax")
    run = workspace / "whole"
    train(config(12, eval__tasks=TASKS, eval__tasks_every=5, eval__task_items=3), run)
    rows = read_metrics(Run(run).metrics)
    assert [row["step"] for row in rows if task_fields(row)] == [5, 10, 12]
    assert "step 5: tasks blimp" in caplog.text
    assert all(3 * rows[11][name] == round(3 * rows[11][name]) for name in ("task_blimp", "task_choices:own"))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("blmp", r"--eval.tasks: unknown task blmp .*did you mean blimp\?"),
        ("blimp=none.jsonl", "--eval.tasks blimp=.*none.jsonl: no file matches"),
        ("choices=pairs.jsonl", "column context is missing"),
        ("lambada", "lambada needs the network.*--eval.tasks lambada=FILE"),
    ],
)
def test_names_and_data_are_checked_before_a_tokenizer_is_learned(workspace, monkeypatch, task, message):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("slm_jax.training.setup.prepare_data_together", None)
    with pytest.raises(UserError, match=message):
        train(config(eval__tasks=(task,)), workspace / "refused")
    assert not (workspace / "refused").exists()


def test_the_scores_use_the_arrays_of_training():
    settings = config(mesh__data=2)
    steps = make_steps(settings, 300, sharding.make_mesh(settings))
    weights = steps.init().weights
    scorer = Scorer(steps.model(sharding.local_replica(weights)), 16)
    pointers = [leaf.addressable_data(0).unsafe_buffer_pointer() for leaf in jax.tree.leaves(weights)]
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(scorer._params)] == pointers
