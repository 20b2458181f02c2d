"""Studies of scaling: planned, run by real processes, killed, continued, and their results."""

import csv
import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from slm_jax.cli.scaling import main, parse_args
from slm_jax.config.schema import Config
from slm_jax.performance import flops
from slm_jax.scaling import results
from slm_jax.scaling.collect import FinishedRun
from slm_jax.scaling.law import Law
from slm_jax.scaling.prediction import can_fit, fit, notes, predict
from slm_jax.scaling.study import Study, parse_numbers, size_setting
from slm_jax.utils.errors import UserError
from tests.processes import Process, command_environment, kill_at_random_instants
from tests.runs import assert_same_run

SIZES = (250e3, 500e3, 1e6)
BUDGETS = (1e12, 3e12, 9e12)


@pytest.fixture(scope="module")
def study():
    return Study(Config.load("quickstart"), BUDGETS, SIZES, seeds=2)


class TestPlan:
    def test_runs_meet_size_and_budget(self, study, tmp_path):
        trials = study.trials(tmp_path, 2048)
        assert [trial.config.train.seed for trial in trials] == [0] * 9 + [1] * 9
        assert len({trial.run for trial in trials}) == 18
        for trial, (budget, size) in zip(trials, [(b, s) for b in BUDGETS for s in SIZES] * 2, strict=True):
            config = trial.config
            tokens = config.train.steps * config.train.batch_size * config.train.sequence_length
            counted = tokens * flops.train_flops_per_token(config.model, 2048, config.train.sequence_length)
            setting = size_setting(trial)
            assert (setting.flops, setting.tokens) == (pytest.approx(counted), tokens)
            assert setting.flops == pytest.approx(budget, rel=0.03)
            assert setting.parameters == flops.parameters(config.model, 2048) == pytest.approx(size, rel=0.06)
            assert config.train.sequence_length == 256
            assert config.tokenizer == study.base.tokenizer
            assert config.eval.every == config.train.steps

    def test_given_options_are_kept(self, study, tmp_path):
        base = Config.load("quickstart", **{"optimizer.lr": 0.123, "model.depth": 3})
        kept = dataclasses.replace(study, base=base, given=("optimizer.lr", "model.depth"))
        for trial in kept.trials(tmp_path, 2048):
            assert (trial.config.optimizer.lr, trial.config.model.depth) == (0.123, 3)

    def test_the_folder_alone_continues_the_study(self, tmp_path):
        folder = tmp_path / "study"
        words = [
            "--to",
            str(folder),
            "--budgets",
            "3e12",
            "1T",
            "--sizes",
            "1M",
            "250k",
            "500k",
            "--optimizer.lr",
            "0.1",
        ]
        study, _, _ = parse_args(words)
        assert (study.budgets, study.sizes, study.given) == ((1e12, 3e12), SIZES, ("optimizer.lr",))
        folder.mkdir()
        study.save(folder)
        assert parse_args(["--to", str(folder)])[0] == study
        more = parse_args(["--to", str(folder), "--seeds", "3", "--budgets", "9T", "1T", "--sizes", "2M"])[0]
        assert (more.seeds, more.budgets, more.sizes) == (3, BUDGETS, (*SIZES, 2e6))
        more.save(folder)
        assert parse_args(words)[0].budgets == BUDGETS  # the command that began the study drops nothing
        with pytest.raises(UserError, match=r"--seeds 2: the study in .* has 3"):
            parse_args(["--to", str(folder), "--seeds", "2"])
        with pytest.raises(UserError, match="--budgets: a value is given twice"):
            parse_args(["--to", str(folder), "--budgets", "3e13", "30T"])
        with pytest.raises(UserError, match=r"--sizes: 2e\+06 of the study in .* is missing"):
            study.require_continues(dataclasses.replace(more, budgets=study.budgets, seeds=1), folder)
        with pytest.raises(UserError, match=r"optimizer.lr \(0.2, before 0.1\).*Give the same, or another --to"):
            parse_args([*words[:-1], "0.2"])
        (folder / "scaling.toml").write_text("[scaling]\nbudgets = 3\n")
        with pytest.raises(UserError, match="is not the definition of a scaling"):
            parse_args(["--to", str(folder)])

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--budgets", "1e12", "--sizes", "250k", "500k", "1M"], "--budgets: give 2 values or more"),
            (["--budgets", "1e12", "2e12", "--sizes", "250k", "1M"], "--sizes: give 3 values or more"),
            (["--budgets", "1e12", "1e12", "--sizes", "250k", "500k", "1M"], "--budgets: a value is given twice"),
            (["--budgets", "1e12", "much"], "--budgets much: should be a positive number"),
            (["--sizes", "-3"], "--sizes -3: should be a positive number"),
            (["--seeds", "0"], "--seeds 0 must be from 1 to 1,000"),
            (["--seeds", "1000000000000"], "--seeds 1000000000000 must be from 1 to 1,000"),
            (
                ["--budgets", "1e12", "2e12", "--sizes", "250k", "500k", "1M", "--train.steps", "9"],
                "--train.steps follows from the budget",
            ),
        ],
    )
    def test_invalid_command_lines(self, words, message, tmp_path):
        with pytest.raises(UserError, match=message):
            parse_args(["--to", str(tmp_path / "new"), *words])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"budgets": (1e9, 1e10)}, r"--budgets 1e\+09: only 2 steps of 250000 parameters"),
            ({"sizes": (250e3, 251e3, 1e6)}, "--sizes 250000 and 251000 lead to the same model"),
            ({"sizes": (1e3, 2e3, 3e3)}, "no model of 1,000 parameters"),
        ],
    )
    def test_impossible_studies(self, study, change, message, tmp_path):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(study, **change).trials(tmp_path, 2048)

    def test_minutes_of_a_preset_are_refused(self, study):
        with pytest.raises(UserError, match=r"train\.minutes of the config"):
            dataclasses.replace(study, base=Config.load("minute", train__minutes=2.0)).require_valid()

    def test_a_target_within_the_budgets_is_no_prediction(self, tmp_path):
        words = ["--budgets", "1e12", "3e12", "--sizes", "250k", "500k", "1M", "--target", "2e12"]
        with pytest.raises(UserError, match=r"--target 2e\+12 must be above the largest budget"):
            main(["--to", str(tmp_path / "new"), *words])

    def test_numbers(self):
        assert parse_numbers("sizes", ["1.2M", "300k", "2B", "1e5"]) == (1e5, 3e5, 1.2e6, 2e9)


LAW = Law(0.8, 60.0, 60.0, 0.3, 0.3)


def synthetic_runs(study, folder, noise=0.0):
    """The runs of a study as if they had been trained, with the losses of a law."""
    source = np.random.default_rng(0)
    return [
        FinishedRun(
            trial,
            size_setting(trial).parameters,
            size_setting(trial).tokens,
            size_setting(trial).flops,
            10.0,
            0.5,
            float(
                LAW.loss(size_setting(trial).parameters, size_setting(trial).tokens) * np.exp(source.normal(0, noise))
            ),
        )
        for trial in study.trials(folder, 2048)
    ]


class TestResults:
    def test_the_files_are_those_of_the_law(self, study, tmp_path):
        wide = dataclasses.replace(study, sizes=(180e3, *SIZES, 2e6))
        runs = synthetic_runs(wide, tmp_path, noise=0.002)
        fits = fit(runs, draws=12)
        prediction = predict(fits, wide, 4e13, 2048, tmp_path)
        expected = LAW.loss(size_setting(prediction.trial).parameters, size_setting(prediction.trial).tokens)
        assert prediction.loss.holds(float(expected))
        found = notes(fits, runs, 4)
        results.write_json(tmp_path / "a.json", fits, prediction, None, "loss", found)
        content = json.loads((tmp_path / "a.json").read_text())
        assert content["runs"] == 30
        assert content["law"]["alpha"]["low"] < LAW.alpha < content["law"]["alpha"]["high"]
        assert content["prediction"]["loss"]["value"] == pytest.approx(prediction.loss.value)
        results.write_csv(tmp_path / "a.csv", [run.trial for run in runs], runs[:-1], "loss")
        rows = list(csv.DictReader((tmp_path / "a.csv").open()))
        assert [row["loss"] for row in rows] == [*(str(run.loss) for run in runs[:-1]), ""]
        text = "\n".join([*results.fit_lines(fits), *results.prediction_lines(prediction, "loss")])
        assert "L(N, D) = " in text
        assert "for one run" in text
        table = results.run_table(runs, "loss").splitlines()
        assert sum(line.endswith("best") for line in table) == len(BUDGETS)
        assert len(table) == 1 + 15

    def test_what_limits_the_conclusions_is_said(self, study, tmp_path):
        runs = synthetic_runs(study, tmp_path)
        assert can_fit(runs)
        assert not can_fit([run for run in runs if size_setting(run.trial).parameters < 600e3])
        repeated = [dataclasses.replace(run, epochs=7.0) for run in runs]
        text = " ".join(notes(fit(repeated, draws=4), repeated, 4))
        assert "18 of 18 runs read the text more than 4 times (up to 7)" in text
        few = [run for run in runs if size_setting(run.trial).budget == BUDGETS[0] and run.trial.config.train.seed == 0]
        text = " ".join(notes(fit(few, draws=4), few, 4))
        assert "No law of the loss" in text


@pytest.mark.slow
def test_a_killed_study_ends_with_the_same_files(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"The {n}th line of the text is about {n * n}.\n" for n in range(4000)))
    environment = command_environment(tmp_path / "cache")
    shared = {
        "data.files": "a.txt",
        "tokenizer.vocab_size": "320",
        "train.sequence_length": "16",
        "train.dtype": "float32",
        "checkpoint.every": "10",
        "mesh.data": "1",
    }

    def start(folder, *more):
        program = [sys.executable, "-m", "slm_jax.scaling", "--to", folder, *more]
        program += ["--budgets", "3e9", "6e9", "--sizes", "60k", "80k", "120k"]
        program += [word for name, value in shared.items() for word in (f"--{name}", value)]
        return Process(
            program, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(folder, *more):
        process = start(folder, *more)
        out, errors = process.communicate()
        return process.returncode, out, errors

    code, out, errors = run("whole", "--dry-run")
    assert code == 0, errors
    assert "6 runs, 0 finished" in out
    assert not (tmp_path / "whole").exists()
    code, out, errors = run("whole")
    assert code == 0, errors
    assert "L(N, D)" in out
    kill_at_random_instants(
        lambda: start("killed"), (4, 25), kills=2, begin_again=lambda: shutil.rmtree(tmp_path / "killed")
    )
    assert run("killed")[0] == 0
    for name in ("results.csv", "scaling.json", "scaling.toml"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for path in (tmp_path / "whole/runs").iterdir():
        assert_same_run(path, tmp_path / "killed/runs" / path.name)

    code, out, errors = run("whole", "--check")
    content = json.loads((tmp_path / "whole/scaling.json").read_text())
    if "prediction" not in content:  # the sizes have no minimum in between: nothing to check
        assert code == 2
        assert "--check: there is no prediction" in errors
    else:
        assert code == int(not content["check"]["passed"])
        assert "held-out run" in out
