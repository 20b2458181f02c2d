"""Curricula: trained stage by stage, killed and resumed, extended, and refused if changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jax
import pytest
from flax import nnx

from slm_jax.cli import orchestrator as orchestrator_command
from slm_jax.cli.train import parse_args
from slm_jax.config.curriculum import Curriculum
from slm_jax.config.presets import preset_names
from slm_jax.config.schema import Config
from slm_jax.curriculum import orchestrate as stages_module
from slm_jax.curriculum import stage_scores
from slm_jax.curriculum.orchestrate import orchestrate
from slm_jax.run.directory import Run, curriculum_of, find_run
from slm_jax.run.load import load_run
from slm_jax.run.metrics import read_metrics
from slm_jax.run.results import read_benchmarks, read_stage_scores
from slm_jax.training.recorder import StepRecorder
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError
from tests.processes import Process, command_environment, kill_at_random_instants, wait_for
from tests.runs import assert_same_run, without_clock

ROOT = Path(stages_module.__file__).parents[2]

SHARED = """
[model]
dim = 32
depth = 1
heads = 2
mlp_dim = 64

[tokenizer]
vocab_size = 320

[optimizer]
name = "adamw"
warmup_steps = 2

[train]
batch_size = 4
sequence_length = 16
dtype = "float32"

[checkpoint]
every = 3

[eval]
every = 5
max_tokens = 300
sample_tokens = 0

[mesh]
data = 1

[curriculum]
evaluate = ["heldout"]
"""
STAGES = """
[[stages]]
name = "plain"
data.files = ["{path}/a.txt"]
train.steps = 8
optimizer.schedule = "constant"

[[stages]]
name = "mixed"
epochs = 0.03
data.mix = ["{path}/a.txt=1", "{path}/b.txt=2"]
init.optimizer = "carry"
train.sequence_length = 24
model.dropout = 0.1
"""
TASKS = """
[[stages]]
name = "tasks"
data.files = ["{path}/tasks.jsonl"]
data.template = "Q {{instruction}}\\nA "
data.mode = "padded"
train.steps = 4
optimizer.lr = 0.003
"""


class Workspace:
    """A folder with texts and a curriculum, in which the command is run."""

    def __init__(self, path):
        self.path = path
        for name, animal in (("a", "fox"), ("b", "owl")):
            lines = (f"Line {i} of {name}: the {animal} sees {i * 7 % 13} lazy dogs.\n" for i in range(500))
            (path / f"{name}.txt").write_text("".join(lines))
        tasks = ({"instruction": f"Say {i}" * (i % 3 + 1), "output": f"{i} " * (i % 4 + 1)} for i in range(200))
        (path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
        self.text = f'{SHARED}\n[data]\ncache = "{path}/cache"\n' + STAGES.format(path=path)
        self.more = self.text + TASKS.format(path=path)
        (path / "two.toml").write_text(self.text)
        self.environment = command_environment(path / "cache") | {"PYTHONPATH": str(ROOT)}

    def start(self, *args):
        command = [sys.executable, "-m", "slm_jax.orchestrator", "--config", "two.toml", *map(str, args)]
        return Process(
            command, cwd=self.path, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, *args):
        process = self.start(*args)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return out, err

    def changed(self, old, new):
        assert self.text.count(old) == 1
        (self.path / "changed.toml").write_text(self.text.replace(old, new))
        return self.path / "changed.toml"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("curriculum"))


@pytest.fixture(scope="module")
def finished(workspace):
    """Return the folder of a curriculum that was trained in one call, and the output of the command."""
    out, err = workspace.run("--run", "whole")
    return workspace.path / "whole", out, err


def stage_names(folder):
    return sorted(path.name for path in (folder / "stages").iterdir())


def assert_same_curriculum(first, second):
    assert stage_names(first) == stage_names(second)
    for name in stage_names(first):
        one = first / "stages" / name
        two = second / "stages" / name
        for path in (one, two):  # written only where there are samples
            (path / "samples.md").touch()
        assert_same_run(one, two)
    tables = [read_benchmarks(folder / "benchmarks.csv") for folder in (first, second)]
    assert [row["stage"] for row in tables[0]] == stage_names(first)
    clock = {"timestamp", "seconds", "tokens_per_second", "mfu"}
    a, b = ([{k: v for k, v in row.items() if k not in clock} for row in rows] for rows in tables)
    assert a == b
    assert read_stage_scores(first) == read_stage_scores(second)


def test_every_stage_is_a_run_and_a_row(finished):
    folder, out, err = finished
    assert stage_names(folder) == ["01-plain", "02-mixed"]
    assert "stage 2 of 2: mixed" in err
    assert "weights of 01-plain, optimizer state kept" in err
    assert "initial weights: run whole/stages/01-plain, step " in err
    rows = read_benchmarks(folder / "benchmarks.csv")
    for row, name in zip(rows, stage_names(folder), strict=True):
        run = Run(folder / "stages" / name)
        steps = read_metrics(run.metrics)
        config = run.read_config()
        last = steps[-1]
        assert [each["step"] for each in steps] == list(range(1, config.train.steps + 1))
        assert run.newest_step() == config.train.steps
        found = [row[n] for n in ("loss", "perplexity", "accuracy", "bits_per_byte", "train_loss", "seconds")]
        wanted = ("val_loss", "val_perplexity", "val_accuracy", "val_bits_per_byte", "loss", "seconds")
        assert found == [last[n] for n in wanted]
        assert (row["stage"], row["steps"], row["batch"], row["items"]) == (name, last["step"], 4, 4 * last["step"])
        assert row["tokens"] == sum(each["tokens"] for each in steps)
        assert row["parameters"] == _parameters(run)
        assert row["jax"] == jax.__version__
        assert row["device"]
        assert run.tokenizer.read_bytes() == (folder / "tokenizer.hybtok").read_bytes()
        assert f"{row['bits_per_byte']:.3f}" in out
    assert rows[1]["bits_per_byte"] < rows[0]["bits_per_byte"]
    assert "--run whole" in out


def _parameters(run):
    return sum(x.size for x in jax.tree.leaves(nnx.state(load_run(str(run.path)).model, nnx.Param)))


def test_each_stage_is_evaluated_once(workspace, finished):
    folder = finished[0]
    for name in stage_names(folder):
        run = Run(folder / "stages" / name)
        found = json.loads((run.path / "evaluation.json").read_text())
        assert {row["task"] for row in found["results"]} == {"heldout"}
        assert {row["step"] for row in found["results"]} == {run.newest_step()}
        value = next(row["value"] for row in found["results"] if (row["metric"], row["group"]) == ("loss", "all"))
        assert value == pytest.approx(read_metrics(run.metrics)[-1]["val_loss"], abs=0.5)
        before = (run.path / "evaluation.json").stat().st_mtime_ns
        stages_module._evaluate(run, ["heldout"])
        assert (run.path / "evaluation.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"curriculum\.evaluate: unknown task heldup"):
        orchestrate(workspace.changed('["heldout"]', '["heldup"]'), workspace.path / "not")


def test_epochs_are_steps_rounded_up(finished):
    folder, _, err = finished
    run = Run(folder / "stages" / "02-mixed")
    manifest = json.loads((run.corpus / "manifest.json").read_text())
    parts = [json.loads((run.corpus / each["folder"] / "manifest.json").read_text()) for each in manifest["mix"]]
    windows = sum(-(-part["train"]["tokens"] // 24) for part in parts)
    steps = -(-0.03 * windows // 4)
    assert run.read_config().train.steps == steps
    assert f"0.03 epochs of {windows / 4:,.1f} steps each are {steps:.0f} steps, rounded up" in err
    for many in (1e9, 1e300):
        with pytest.raises(UserError, match=r"epochs of .* steps each are more than 2,147,483,647 steps: lower epochs"):
            stages_module._steps_of_epochs(run.read_config(), run, many)


def test_each_model_is_scored_on_the_text_of_all_stages(finished):
    folder, out, _ = finished
    found = {(row["after"], row["text"]): row["bits_per_byte"] for row in read_stage_scores(folder)}
    names = stage_names(folder)
    assert set(found) == {(after, text) for after in names for text in names}
    for row in read_benchmarks(folder / "benchmarks.csv"):  # on its own text: what its last validation gave
        assert found[row["stage"], row["stage"]] == pytest.approx(row["bits_per_byte"], rel=1e-6)
    assert found[names[1], names[1]] < found[names[0], names[1]]
    assert stage_scores.table(read_stage_scores(folder)) in out


def test_a_curriculum_is_opened_as_its_newest_stage(finished):
    folder, _, _ = finished
    run = find_run(str(folder), trained=True)
    assert run.path == folder / "stages" / "02-mixed"
    assert curriculum_of(run) == folder
    with pytest.raises(UserError, match=r"slm_jax\.orchestrator --run"):
        parse_args(["--run", str(folder), "--resume"])
    with pytest.raises(UserError, match=r"slm_jax\.orchestrator --run"):
        train(Config.load("minute"), folder)
    loaded = load_run(str(folder))
    assert (loaded.run.path, loaded.step) == (run.path, run.newest_step())


def test_killed_and_resumed_it_ends_bit_identical(workspace, finished):
    """SIGKILL comes after steps of the second stage, before its first checkpoint but that of the warm start."""
    rows = workspace.path / "killed" / "stages" / "02-mixed" / "metrics.jsonl"
    process = workspace.start("--run", "killed")
    wait_for(lambda: rows.is_file() and rows.stat().st_size > 0, process, seconds=300)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    out, _ = workspace.run("--run", "killed")
    assert_same_curriculum(finished[0], workspace.path / "killed")
    assert "02-mixed" in out


@pytest.mark.slow
def test_killed_at_random_instants_it_ends_bit_identical(workspace, finished):
    begin = time.monotonic()
    workspace.run("--run", "timed")
    seconds = time.monotonic() - begin
    kill_at_random_instants(
        lambda: workspace.start("--run", "random"),
        (0.2 * seconds, 0.9 * seconds),
        kills=5,
        begin_again=lambda: shutil.rmtree(workspace.path / "random"),
    )
    workspace.run("--run", "random")
    assert_same_curriculum(finished[0], workspace.path / "random")


def test_a_signal_is_passed_on_and_a_stage_is_added_to_a_moved_curriculum(
    workspace, finished, tmp_path, monkeypatch, capsys, caplog
):
    """In a copy, a third stage is appended, stopped by SIGTERM, and finished by the same command."""
    folder = tmp_path / "moved"
    shutil.copytree(finished[0], folder)
    (tmp_path / "three.toml").write_text(workspace.more)
    before = {path: path.read_bytes() for path in folder.glob("stages/*/metrics.jsonl")}
    record = StepRecorder.record

    def stop(self, step, *args):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return record(self, step, *args)

    caplog.set_level("INFO", "slm_jax")
    command = ["orchestrator", "--config", str(tmp_path / "three.toml"), "--run", str(folder)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr("slm_jax.utils.process.tune_process", lambda: None)
    monkeypatch.setattr(StepRecorder, "record", stop)
    with pytest.raises(SystemExit) as ended:
        orchestrator_command.main()
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 2 of 03-tasks" in capsys.readouterr().out
    monkeypatch.setattr(StepRecorder, "record", record)
    orchestrator_command.main()
    assert "continuing after step 2" in caplog.text
    assert "learning a tokenizer" not in caplog.text
    assert stage_names(folder) == ["01-plain", "02-mixed", "03-tasks"]
    assert (folder / "report.html").is_file()
    assert [row["stage"] for row in read_benchmarks(folder / "benchmarks.csv")] == stage_names(folder)
    assert {path: path.read_bytes() for path in before} == before
    assert Run(folder / "stages" / "03-tasks").read_config().init.from_run == str(folder / "stages" / "02-mixed")


def test_a_stage_can_be_restarted_after_its_folder_was_removed(workspace, finished, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "stages" / "02-mixed")
    stages_module._begin(folder, Curriculum.load(workspace.changed("model.dropout = 0.1", "model.dropout = 0.2")))
    assert {(row["after"], row["text"]) for row in read_stage_scores(folder)} == {("01-plain", "01-plain")}


def test_started_stages_cannot_be_changed(workspace, finished):
    folder, _, _ = finished
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    changes = {
        ("train.steps = 8", "train.steps = 9"): ["stage 1 (plain)", "train.steps: 8 saved, 9 current"],
        ("epochs = 0.03", "epochs = 0.04"): ["stage 2 (mixed)", "0.04 epochs are"],
        ("model.dropout = 0.1", "model.dropout = 0.2"): ["stage 2 (mixed)", "model.dropout: 0.1 saved, 0.2 current"],
        ('name = "plain"', 'name = "other"'): ["01-plain was started, and now stage 1 is other"],
        ("vocab_size = 320", "vocab_size = 400"): ["tokenizer.vocab_size: 320 saved, 400 current"],
    }
    for (old, new), message in changes.items():
        with pytest.raises(UserError) as caught:
            orchestrate(workspace.changed(old, new), folder)
        assert all(part in str(caught.value) for part in (*message, "remove its folder")), str(caught.value)
    (workspace.path / "changed.toml").write_text(workspace.text.partition('[[stages]]\nname = "mixed"')[0])
    with pytest.raises(UserError, match="02-mixed was started, and now there are 1 stages"):
        orchestrate(workspace.path / "changed.toml", folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")} == kept
    for bad in (folder / "stages" / "01-plain", folder / "stages"):
        with pytest.raises(UserError, match="but no curriculum: use another --run"):
            orchestrate(workspace.path / "two.toml", bad)


def test_a_stage_that_was_stopped_early_is_finished(workspace, tmp_path, monkeypatch):
    """It is not trained further, and the options that ended it are fixed, also before the next stage is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    early = workspace.text.replace("train.steps = 8", "train.steps = 40\ntrain.stop_early = 2\noptimizer.lr = 4.0")
    first = early.partition('[[stages]]\nname = "mixed"')[0]
    folder = tmp_path / "early"

    def outcome(text, **overrides):
        (tmp_path / "early.toml").write_text(text)
        return orchestrate(Curriculum.load(tmp_path / "early.toml", **{"curriculum.evaluate": (), **overrides}), folder)

    end = outcome(first).results[0].step
    assert end < 40
    (result,) = outcome(first).results
    assert (result.step, result.trend.since_best) == (end, 2)
    rows = Run(folder / "stages" / "01-plain").metrics.read_bytes()
    for name, value in (("stop_early", 0), ("stop_early", 3), ("steps", 50)):
        saved = {"stop_early": 2, "steps": 40}[name]
        for text in (first, early):
            changed = text.replace(f"train.{name} = {saved}", f"train.{name} = {value}")
            with pytest.raises(
                UserError, match=rf"\(plain\) was started with another train\.{name}: {saved} saved, {value}"
            ):
                outcome(changed)
    assert [result.step for result in outcome(first.replace("stop_early = 2", "stop_early = 1")).results] == [end]
    outcome(early)
    assert stage_names(folder) == ["01-plain", "02-mixed"]
    assert Run(folder / "stages" / "01-plain").metrics.read_bytes() == rows


def test_all_problems_are_reported_at_once_with_their_stage(workspace, tmp_path):
    text = SHARED.replace("batch_size = 4", "batch_size = 0") + """
[[stages]]
name = "one"
epochs = 1
train.steps = 3
model.dropout = 2.0
lr = 0.1

[[stages]]
name = "one"
model.dim = 64
tokenizer.vocab_size = 500
optimizer.name = "muon"
init.optimizer = "carry"

[[stages]]
name = "a b"
init.from_run = "elsewhere"
"""  # fmt: skip
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        Curriculum.load(tmp_path / "bad.toml")
    message = str(caught.value)
    for part in (
        "  - train.batch_size = 0: should be greater than or equal to 1",
        "stage 1 (one): epochs and train.steps both set its length",
        "stage 1 (one): model.dropout = 2.0",
        "stage 1 (one): unknown key stages.lr, perhaps you meant optimizer.lr",
        "stage 2 (one): there is one tokenizer for all stages",
        "stage 3 (a b): stages.name = 'a b': should be letters, digits",
        "stage 3 (a b): init.from_run is for the start of the first stage",
    ):
        assert part in message, message
    assert message.count("train.batch_size") == 1
    good = text.replace("batch_size = 0", "batch_size = 4").replace("lr = 0.1\n", "").replace("epochs = 1\n", "")
    good = good.replace("dropout = 2.0", "dropout = 0.2").replace('"a b"\ninit.from_run = "elsewhere"', '"b"')
    (tmp_path / "bad.toml").write_text(good.replace("tokenizer.vocab_size = 500\n", ""))
    with pytest.raises(UserError) as caught:
        Curriculum.load(tmp_path / "bad.toml")
    message = str(caught.value)
    assert "2 stages are named one" in message
    assert "model.dim: 32 in stage 1 (one), 64 in stage 2 (one)" in message
    assert "optimizer.name: 'adamw' in stage 1 (one), 'muon' in stage 2 (one)" in message
    with pytest.raises(UserError, match=r"stage 1 \(a\): train\.minutes is for single runs"):
        Curriculum.from_tree({"stages": [{"name": "a", "train": {"minutes": 2.0}}]})
    with pytest.raises(UserError, match=r"a curriculum needs stages: .*; python -m slm_jax\.train trains"):
        Curriculum.from_tree({"train": {"steps": 3}})
    with pytest.raises(UserError, match=r"stage 1 \(plain\): data.files: no file matches"):
        orchestrate(workspace.changed('files = ["', 'files = ["/nowhere'), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_stage_has_a_folder_in_checkpoint_folder(workspace, tmp_path):
    stages = Curriculum.load(workspace.path / "two.toml", **{"checkpoint.folder": "gs://bucket/x"}).stages
    found = [stages_module._stage_config(stage, tmp_path).checkpoint.folder for stage in stages]
    assert found == ["gs://bucket/x/01-plain", "gs://bucket/x/02-mixed"]
    again = [
        stages_module._relocated(stages_module._stage_config(stage, tmp_path), stage, tmp_path) for stage in stages
    ]
    assert [config.checkpoint.folder for config in again] == found


def test_a_curriculum_may_start_with_the_weights_of_a_run(workspace, finished, tmp_path):
    """Its tokenizer and weights are those of the run; later stages start with those of the stage before."""
    given = {"init.from_run": str(finished[0]), "init.optimizer": "carry"}
    curriculum = Curriculum.load(workspace.path / "two.toml", **given)
    tmp_path.joinpath("x").mkdir()
    stages_module._begin(tmp_path / "x", curriculum)
    assert (tmp_path / "x" / "tokenizer.hybtok").read_bytes() == (finished[0] / "tokenizer.hybtok").read_bytes()
    starts = [stage.config.init for stage in curriculum.stages]
    assert (starts[0].from_run, starts[0].optimizer) == (str(finished[0]), "keep")
    assert starts[1].from_run != str(finished[0])


def test_overrides_reach_every_stage(workspace):
    curriculum = Curriculum.load(workspace.path / "two.toml", **{"train.steps": 3, "model.dropout": 0.3})
    assert [stage.config.train.steps for stage in curriculum.stages] == [3, 3]
    assert [stage.config.model.dropout for stage in curriculum.stages] == [0.3, 0.3]
    assert [stage.epochs for stage in curriculum.stages] == [None, None]
    again = Curriculum.from_tree(tomllib.loads(curriculum.to_toml()))
    assert again.stages == curriculum.stages
    mixed = Curriculum.load(workspace.path / "two.toml").stages[1].config.data
    assert (mixed.files, len(mixed.mix)) == ((), 2)
    one = Curriculum.load(workspace.path / "two.toml", data__files=("x.txt",))
    assert [(stage.config.data.files, stage.config.data.mix) for stage in one.stages] == [(("x.txt",), ())] * 2


def test_presets_are_valid():
    names = preset_names(curricula=True)
    assert {"curriculum", "curriculum-offline"} <= set(names)
    stages = {name: [stage.name for stage in Curriculum.load(name).stages] for name in names}
    assert stages["curriculum"] == ["tinystories", "wikitext", "openwebtext", "alpaca"]
    with pytest.raises(UserError, match=r"slm_jax\.orchestrator"):
        Config.load("curriculum")


def test_a_finished_stage_is_reported_as_such(finished, caplog):
    caplog.set_level("INFO", "slm_jax")
    run = Run(finished[0] / "stages" / stage_names(finished[0])[-1])
    train(run.read_config(), run.path)
    assert f"this stage is finished: {run.newest_step()} steps are done" in caplog.messages


@pytest.mark.slow
def test_a_corrupt_last_checkpoint_is_repaired_before_the_next_stage(workspace, finished, tmp_path, caplog):
    whole = tmp_path / "whole"
    hurt = tmp_path / "hurt"
    (tmp_path / "three.toml").write_text(workspace.more)
    for folder in (whole, hurt):
        shutil.copytree(finished[0], folder)
    run = Run(hurt / "stages" / "02-mixed")
    for file in (run.checkpoints / str(run.newest_step()) / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for folder in (whole, hurt):
        orchestrate(tmp_path / "three.toml", folder)
    assert "is corrupt and skipped" in caplog.text
    for name in stage_names(whole):
        rows = [read_metrics(folder / "stages" / name / "metrics.jsonl") for folder in (whole, hurt)]
        assert without_clock(rows[0]) == without_clock(rows[1])
