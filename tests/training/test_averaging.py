"""Test the moving average of the parameters against NumPy, in the training state and in every reader of a run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.config.schema import Config
from slm_jax.data.corpus.corpus import open_corpus
from slm_jax.evaluation import evaluate
from slm_jax.model import lora
from slm_jax.model.params import pure_params
from slm_jax.run.directory import Run
from slm_jax.run.load import load_adapters, load_run
from slm_jax.training import validation
from slm_jax.training.options import averaging
from slm_jax.training.steps import make_steps
from slm_jax.training.train import train
from tests.helpers import TINY
from tests.runs import read_rows, saved_arrays, without_clock

DECAY = 0.7
SMALL = {**TINY, "model.depth": 1, "model.heads": 2, "train.batch_size": 4, "tokenizer.vocab_size": 320}
SMALL |= {"eval.sample_tokens": 0, "train.steps": 4, "checkpoint.every": 1, "checkpoint.keep": 9, "mesh.data": 1}
OPTIONS = {
    "data.mode": "best-fit",
    "optimizer.name": "normuon",
    "optimizer.orthogonalization": "polar-express",
    "optimizer.momentum_warmup_steps": 3,
    "optimizer.cautious_decay": True,
    "optimizer.schedule": "constant",
    "optimizer.average_decay": DECAY,
}


def naive_average(history, decay):
    """Return the average of arrays with the weights dⁿ⁻ᵏ."""
    weights = decay ** np.arange(len(history))[::-1]
    return np.tensordot(weights / weights.sum(), np.asarray(history, np.float64), 1)


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_average_agrees_with_its_definition(decay):
    history = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    average = averaging.init({"x": jnp.full(3, 1e3)})  # initial weights do not enter
    update = jax.jit(lambda mean, x: averaging.update(mean, {"x": x}, decay))
    for count, x in enumerate(history, 1):
        average = update(average, x)
        np.testing.assert_allclose(average["params"]["x"], naive_average(history[:count], decay), atol=2e-4)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a text and a run of four steps with a checkpoint after each."""
    path = tmp_path_factory.mktemp("average")
    (path / "a.txt").write_text("".join(f"Line {i}: the fox sees {i * 7 % 13} dogs.\n" for i in range(400)))
    source = np.random.default_rng(0)
    pairs = [["".join(source.choice(list("aeinorst "), 12)) for _ in range(2)] for _ in range(150)]
    lines = [json.dumps({"sentence_good": good, "sentence_bad": bad}) + "\n" for good, bad in pairs]
    (path / "pairs.jsonl").write_text("".join(lines))
    train(config_of(path, **{"eval.tasks": [f"blimp={path / 'pairs.jsonl'}"]}), path / "run")
    return path


def config_of(path, **overrides):
    given = {"data.files": str(path / "a.txt"), "data.document": "line", "data.cache": str(path / "cache")}
    return Config.load(**{**SMALL, **OPTIONS, **given, **overrides})


def test_a_run_keeps_validates_and_loads_the_average(workspace):
    run = Run(workspace / "run")
    folder = workspace / "checkpoints"
    history = []
    for step in range(1, 5):
        shutil.copytree(run.checkpoints / str(step), folder / str(step))
        history.append(saved_arrays(folder)[1])
    loaded = load_run(str(run.path), step=4)
    params = dict(jax.tree_util.tree_leaves_with_path(pure_params(loaded.model)))
    for path, value in params.items():
        name = jax.tree_util.keystr(path)
        expected = naive_average([arrays[f"['params']{name}"] for arrays in history], DECAY)
        np.testing.assert_allclose(history[-1][f"['average']['params']{name}"], expected, atol=1e-6)
        np.testing.assert_array_equal(value, history[-1][f"['average']['params']{name}"])
        assert not np.array_equal(value, history[-1][f"['params']{name}"])
    steps = make_steps(loaded.config, loaded.tokenizer.vocab_size)
    held_out = open_corpus(run.corpus, loaded.tokenizer).held_out(loaded.config.eval.max_tokens)
    scores = validation.scores(loaded.config, held_out, lambda x: steps.evaluate(pure_params(loaded.model), x))
    assert read_rows(run.path)[-1]["val_loss"] == pytest.approx(scores["loss"], rel=1e-6)


def test_tasks_during_training_score_the_average(workspace):
    tasks = (f"blimp={workspace / 'pairs.jsonl'}",)
    later = evaluate(workspace / "run", tasks, step=4, save=False).rows
    accuracy = next(row["value"] for row in later if (row["group"], row["metric"]) == ("all", "accuracy"))
    assert read_rows(workspace / "run")[-1]["task_blimp"] == accuracy


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(workspace):
    """Resume after step 2 with NorMuon, Polar Express, the momentum schedule, cautious decay, average, best fit."""
    shutil.copytree(workspace / "run", workspace / "resumed")
    for step in range(3, 5):
        shutil.rmtree(workspace / "resumed" / "checkpoints" / str(step))
    train(config_of(workspace), workspace / "resumed")
    runs = [workspace / name for name in ("run", "resumed")]
    rows = [without_clock(read_rows(run)) for run in runs]
    assert rows[0] == rows[1]
    (_, whole), (_, resumed) = (saved_arrays(run / "checkpoints") for run in runs)
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_a_warm_start_begins_with_the_average_of_its_source(workspace):
    config = config_of(workspace, **{"init.from_run": str(workspace / "run"), "train.steps": 1})
    train(config, workspace / "second")
    shutil.rmtree(workspace / "second" / "checkpoints" / "1")
    source = saved_arrays(workspace / "run" / "checkpoints")[1]
    first = saved_arrays(workspace / "second" / "checkpoints")[1]
    for name in [name for name in first if name.startswith("['params']")]:
        np.testing.assert_array_equal(first[name], source[f"['average']{name}"])
        np.testing.assert_array_equal(first[f"['average']{name}"], first[name])
    assert first["['average']['count']"] == 0


@pytest.mark.slow
def test_adapters_are_averaged_and_merged(workspace):
    """On a mesh, so that the average of the initial adapters has the sharding that the step expects."""
    fields = {"init.from_run": str(workspace / "run"), "lora.rank": 2, "train.steps": 3, "checkpoint.keep": 9}
    mesh = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}
    config = config_of(workspace, **fields, **mesh)
    train(config, workspace / "adapted")
    run = Run(workspace / "adapted")
    step, arrays = saved_arrays(run.checkpoints)
    assert step == 3
    adapters, _ = load_adapters(run, config, step=3)
    for path, value in jax.tree_util.tree_leaves_with_path(adapters):
        np.testing.assert_array_equal(value, arrays[f"['average']['params']{jax.tree_util.keystr(path)}"])
    base = pure_params(load_run(str(workspace / "run")).model)
    merged = pure_params(load_run(str(run.path), step=3).model)
    up = adapters["blocks"]["mlp"]["up"]["adapter"]
    expected = base["blocks"]["mlp"]["up"]["weight"] + lora.scale_of(config.lora) * jnp.matmul(up["a"], up["b"])
    np.testing.assert_allclose(merged["blocks"]["mlp"]["up"]["weight"], expected, atol=1e-6)
