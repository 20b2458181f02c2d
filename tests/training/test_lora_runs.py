"""Runs with adapters: frozen weights stored once, exact resume, merged on load, stages, and kills."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from slm_jax.cli import check as check_command
from slm_jax.config.curriculum import Curriculum
from slm_jax.curriculum.orchestrate import orchestrate
from slm_jax.model import lora_merge
from slm_jax.model.params import pure_params
from slm_jax.run.directory import Run
from slm_jax.run.frozen import base_folder
from slm_jax.run.load import load_adapters, load_run
from slm_jax.training.recorder import StepRecorder
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError
from tests.helpers import TINY
from tests.processes import command_environment, kill_at
from tests.runs import assert_same_run, saved_arrays

pytestmark = pytest.mark.slow  # test_dpo_runs.py has a run with adapters among the fast tests

SMALL = {**TINY, "model.depth": 1, "model.heads": 2, "train.batch_size": 4, "tokenizer.vocab_size": 320}
SMALL |= {"eval.sample_tokens": 0, "eval.max_tokens": 200, "train.steps": 6, "checkpoint.every": 3, "mesh.data": 1}
LORA = {"lora.rank": 2, "optimizer.name": "adamw", "eval.every": 3, "checkpoint.keep": 3}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with two texts, a run trained on the first, and one with adapters trained on the second."""
    path = tmp_path_factory.mktemp("lora")
    for name, animal in (("a", "fox"), ("b", "owl")):
        lines = (f"Line {i} of {name}: the {animal} sees {i * 7 % 13} dogs.\n" for i in range(400))
        (path / f"{name}.txt").write_text("".join(lines))
    train(config_of(path, "a"), path / "first")
    shutil.copytree(path / "first", path / "source")
    train(tuned(path), path / "adapted")
    shutil.rmtree(path / "source")  # not needed any more
    return path


def config_of(path, text, **overrides):
    from slm_jax.config.schema import Config

    given = {"data.files": str(path / f"{text}.txt"), "data.cache": str(path / "cache")}
    return Config.load(**{**SMALL, **given, **overrides})


def tuned(path, **overrides):
    return config_of(path, "b", **{"init.from_run": str(path / "source"), **LORA, **overrides})


def leaves(tree):
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


class StoppedError(Exception):
    pass


def test_checkpoints_hold_adapters_and_the_base_is_stored_once(workspace):
    step, arrays = saved_arrays(workspace / "adapted" / "checkpoints")
    assert step == 6
    assert all("adapter" in name for name in arrays if "['params']" in name)
    assert not [name for name in arrays if "embedding" in name or "base" in name]
    base_step, base = saved_arrays(workspace / "adapted" / "checkpoints" / "base")
    _, source = saved_arrays(workspace / "first" / "checkpoints")
    assert base_step == 0
    assert {name for name in source if "['params']" in name} == base.keys()
    assert all(np.array_equal(value, source[name]) for name, value in base.items())

    sizes = [sum(x.nbytes for x in each.values()) for each in (arrays, base)]
    assert sizes[0] < sizes[1] / 2


def test_a_loaded_run_is_the_merged_model(workspace):
    loaded = load_run(str(workspace / "adapted"))
    adapters, text = load_adapters(loaded.run, loaded.config)
    assert text == loaded.step_text
    base = pure_params(load_run(str(workspace / "first")).model)
    expected = leaves(lora_merge.merge(base, adapters, loaded.config.lora))
    found = leaves(pure_params(loaded.model))
    assert expected.keys() == found.keys()
    assert all(np.allclose(found[name], expected[name], atol=1e-7) for name in expected)
    assert any(not np.array_equal(found[name], value) for name, value in leaves(base).items())
    first = load_run(str(workspace / "adapted"), step=0)
    assert all(np.array_equal(value, leaves(base)[name]) for name, value in leaves(pure_params(first.model)).items())


def test_average_is_that_of_the_merged_weights(workspace):
    run = str(workspace / "adapted")
    steps = [leaves(pure_params(load_run(run, step=step).model)) for step in (3, 6)]
    mean = leaves(pure_params(load_run(run, average=2).model))
    for name, value in mean.items():
        assert np.allclose(value, (steps[0][name].astype(np.float64) + steps[1][name]) / 2, atol=1e-7), name


def test_an_interrupted_run_ends_with_the_same_bits(workspace, tmp_path, monkeypatch):
    real = StepRecorder.record

    def record(self, step, *args):
        if step == 5:
            raise StoppedError
        return real(self, step, *args)

    more = {"train.accumulation": 2, "eval.sample_tokens": 4}
    config = tuned(workspace, **{"init.from_run": str(workspace / "first"), **more})
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(StepRecorder, "record", record)
        with pytest.raises(StoppedError):
            train(config, tmp_path / "broken")
    train(config, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_that_starts_with_an_adapted_one_starts_with_its_merged_weights(workspace, tmp_path):
    source = {"init.from_run": str(workspace / "adapted")}
    train(config_of(workspace, "a", **source, **{"train.steps": 1}), tmp_path / "full")
    merged = leaves(pure_params(load_run(str(workspace / "adapted")).model))
    start = leaves(pure_params(load_run(str(tmp_path / "full"), step=0).model))
    assert all(np.array_equal(value, start[name]) for name, value in merged.items())
    with pytest.raises(UserError, match=r"lora\.rank: 2 saved.*use init\.optimizer fresh"):
        train(
            config_of(workspace, "a", **source, **{"init.optimizer": "keep", "optimizer.name": "adamw"}),
            tmp_path / "kept",
        )


def test_options_of_adapters_are_fixed_and_need_weights(workspace, tmp_path):
    with pytest.raises(UserError, match=r"lora\.rank 2 trains adapters of existing weights: give --init\.from_run"):
        train(tuned(workspace, **{"init.from_run": ""}), tmp_path / "none")
    with pytest.raises(UserError, match=r"lora\.alpha: 16\.0 saved, 8\.0 current"):
        train(tuned(workspace, **{"lora.alpha": 8, "train.steps": 8}), workspace / "adapted")


def test_a_damaged_base_is_an_error_that_names_it(workspace, tmp_path):
    shutil.copytree(workspace / "adapted", tmp_path / "run")
    run = Run(tmp_path / "run")
    largest = max(
        (p for p in Path(base_folder(run.checkpoints)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    for use in (lambda: load_run(str(run.path)), lambda: train(tuned(workspace, **{"train.steps": 9}), run.path)):
        with pytest.raises(UserError, match=r"the frozen weights in .*checkpoints/base cannot be used"):
            use()


def test_checks_pass_before_and_after_training(workspace, capsys):
    args = ["--config", str(workspace / "adapted" / "config.toml"), "--init.from_run", str(workspace / "first")]
    check_command.main(args)
    check_command.main(["--run", str(workspace / "adapted")])
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert all("below token frequencies" in line for line in failed), failed  # six steps teach it little


CURRICULUM = """
[model]
dim = 32
depth = 1
heads = 2
mlp_dim = 64
[tokenizer]
vocab_size = 320
[train]
batch_size = 4
sequence_length = 16
dtype = "float32"
steps = 40
[optimizer]
warmup_steps = 2
[checkpoint]
every = 5
[eval]
every = 20
max_tokens = 300
sample_tokens = 4
[mesh]
data = 1
[[stages]]
name = "base"
data.files = ["{path}/a.txt"]
[[stages]]
name = "adapters"
data.files = ["{path}/b.txt"]
lora.rank = 2
[[stages]]
name = "all"
data.files = ["{path}/a.txt"]
train.steps = 10
[[stages]]
name = "preferences"
data.files = ["{path}/pairs.jsonl"]
data.mode = "padded"
epochs = 2
train.objective = "dpo"
train.sequence_length = 64
lora.rank = 2
"""


def test_a_curriculum_killed_in_its_stage_of_adapters_ends_bit_identical(workspace, tmp_path):
    """Base, adapters, all parameters, preferences."""
    pairs = ({"prompt": f"Line {i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40))
    (workspace / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    preset = tmp_path / "stages.toml"
    preset.write_text(CURRICULUM.format(path=workspace))
    orchestrate(Curriculum.load(preset), tmp_path / "whole")
    environment = command_environment(tmp_path / "cache")
    command = [sys.executable, "-m", "slm_jax.orchestrator", "--config", str(preset), "--run", str(tmp_path / "killed")]
    stage = Run(tmp_path / "killed" / "stages" / "02-adapters")

    def starts():
        return (stage.checkpoints / "base").exists() and not (stage.checkpoints / "0").exists()

    kill_at(command, (starts, lambda: stage.path.exists() and (stage.newest_step() or 0) >= 15), environment)
    assert not (tmp_path / "killed" / "stages" / "03-all").exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    for name in ("01-base", "02-adapters", "03-all", "04-preferences"):
        assert_same_run(tmp_path / "whole" / "stages" / name, tmp_path / "killed" / "stages" / name)
