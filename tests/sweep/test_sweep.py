"""Sweeps: planned, run by real processes, killed, continued, and their results."""

import csv
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slm_jax.cli.sweep import convert_word, parse_args
from slm_jax.cli.trials_folder import trials_folder
from slm_jax.config.schema import Config
from slm_jax.run.metrics import read_metrics
from slm_jax.run.trend import Trend, Validation
from slm_jax.sweep import results
from slm_jax.sweep.axes import Setting
from slm_jax.sweep.plan import Sweep
from slm_jax.sweep.results import SettingScore
from slm_jax.sweep.run import finished_score, run_trials
from slm_jax.utils.errors import TrainingError, UserError
from tests.processes import Process, command_environment, kill_at_random_instants
from tests.runs import assert_same_run

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
warmup_steps = 1

[train]
steps = 6
batch_size = 4
sequence_length = 16
dtype = "float32"

[checkpoint]
every = 2

[eval]
every = 6
max_tokens = 300
sample_tokens = 4

[mesh]
data = 1
"""
VARY = ["--vary", "optimizer.lr=0.003,0.01", "model.dropout=0,0.2", "--seeds", "2"]


class TestPlan:
    def test_the_first_seed_of_all_settings_comes_first(self, tmp_path):
        sweep = Sweep(Config.load("minute"), ("optimizer.lr=0.01,0.02",), seeds=2)
        trials = sweep.trials(tmp_path, convert_word)
        found = [(trial.config.optimizer.lr, trial.config.train.seed) for trial in trials]
        assert found == [(0.01, 0), (0.02, 0), (0.01, 1), (0.02, 1)]
        assert len({trial.run for trial in trials}) == 4
        changed = trials[1].config.differences(sweep.base)
        assert changed == {"optimizer.lr": (0.02, sweep.base.optimizer.lr)}

    def test_every_invalid_setting_is_named(self, tmp_path):
        sweep = Sweep(Config.load("minute"), ("model.dim=7,128", "model.dropout=0,2"))
        with pytest.raises(UserError) as error:
            sweep.trials(tmp_path, convert_word)
        lines = str(error.value).splitlines()
        assert [line.partition(":")[0].strip(" -") for line in lines[1:]] == [
            "dim 7, dropout 0.0",
            "dim 7, dropout 2.0",
            "dim 7, dropout 2.0",
            "dim 128, dropout 2.0",
        ]

    @pytest.mark.parametrize(("minutes", "vary"), [(2.0, "model.dropout=0,0.1"), (0.0, "train.minutes=1,2")])
    def test_trials_of_as_many_minutes_are_refused(self, minutes, vary, tmp_path):
        sweep = Sweep(Config.load("minute", train__minutes=minutes), (vary,))
        with pytest.raises(UserError, match=r"train\.minutes .* give train\.steps"):
            sweep.trials(tmp_path, convert_word)

    def test_the_folder_alone_continues_the_sweep(self, tmp_path):
        folder = tmp_path / "sweep"
        sweep, _ = parse_args(["--to", str(folder), *VARY, "--config", "minute", "--train.steps", "9"])
        folder.mkdir()
        sweep.save(folder)
        assert parse_args(["--to", str(folder)])[0] == sweep
        more, _ = parse_args(["--to", str(folder), "--seeds", "5"])
        assert more.seeds == 5
        assert more.base.train.steps == 9
        with pytest.raises(UserError, match=r"train.steps \(10, before 9\).*Give the same, or another --to"):
            parse_args(["--to", str(folder), *VARY, "--config", "minute", "--train.steps", "10"])

    def test_other_folders_are_refused(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(UserError, match="is not empty and holds no sweep"):
            parse_args(["--to", str(tmp_path), *VARY])
        for text in ("vary = 3", 'vary = ["a"]\nseeds = "x"\nrandom = 0\nrandom_seed = 0\nmetric = "m"'):
            (tmp_path / "sweep.toml").write_text(f"[sweep]\n{text}\n")
            with pytest.raises(UserError, match="is not the definition of a sweep"):
                parse_args(["--to", str(tmp_path), *VARY])

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        with (
            pytest.raises(UserError, match=r"notes\.txt is a file, not a folder: use another --to$"),
            trials_folder(tmp_path / "notes.txt", "sweep"),
        ):
            pass

    def test_random_settings_that_were_tried_are_kept(self, tmp_path):
        sweep = Sweep(Config.load("minute"), ("optimizer.lr=0.01..0.1",), num_random=3)
        more = dataclasses.replace(sweep, num_random=5)
        more.require_continues(sweep, tmp_path)
        assert {trial.run for trial in sweep.trials(tmp_path, convert_word)} < {
            trial.run for trial in more.trials(tmp_path, convert_word)
        }
        for change in ({"random_seed": 1}, {"vary": ("optimizer.lr=0.01..0.2",)}):
            with pytest.raises(UserError, match=f"--{next(iter(change))} "):
                dataclasses.replace(more, **change).require_continues(sweep, tmp_path)


class TestTrials:
    """Training is replaced: which errors end a sweep, and which only a trial."""

    def run(self, monkeypatch, tmp_path, errors):
        def train(config, run):
            tried.append(config.optimizer.lr)
            raise errors[config.optimizer.lr]

        tried = []
        monkeypatch.setattr("slm_jax.training.train.train", train)
        sweep = Sweep(Config.load("minute"), ("optimizer.lr=10,0.01",))
        try:
            return tried, run_trials(sweep.trials(tmp_path, convert_word), tmp_path, "loss")
        except UserError as error:
            return tried, error

    def test_a_diverged_first_trial_is_recorded(self, monkeypatch, tmp_path):
        errors = {10.0: TrainingError("diverged"), 0.01: TrainingError("too large")}
        tried, scores = self.run(monkeypatch, tmp_path, errors)
        assert tried == [10.0, 0.01]
        assert list(scores.failures.values()) == ["diverged", "too large"]
        tried, scores = self.run(monkeypatch, tmp_path, errors)
        assert tried == []
        assert len(scores.failures) == 2

    def test_an_error_of_all_trials_ends_the_sweep(self, monkeypatch, tmp_path):
        errors = {10.0: TrainingError("diverged"), 0.01: UserError("no text")}
        assert str(self.run(monkeypatch, tmp_path, errors)[1]) == "no text"
        assert len(json.loads((tmp_path / "failures.json").read_text())) == 1

    @pytest.mark.parametrize(("since_best", "patience", "is_finished"), [(2, 2, True), (1, 2, False), (2, 0, False)])
    def test_a_trial_that_stopped_early_is_finished(self, monkeypatch, tmp_path, since_best, patience, is_finished):
        base = Config.load("minute", **{"train.stop_early": patience})
        trial = Sweep(base, ("optimizer.lr=0.01",)).trials(tmp_path, convert_word)[0]
        trend = Trend(Validation(30, 2.0, 1.0), Validation(10, 1.0, 0.5), since_best)
        monkeypatch.setattr("slm_jax.run.selection.newest_trend", lambda run: trend)
        (trial.run / "checkpoints" / "30").mkdir(parents=True)
        (trial.run / "metrics.jsonl").write_text(json.dumps({"step": 30, "val_bits_per_byte": 1.0}) + "\n")
        assert finished_score(trial, "val_bits_per_byte") == (1.0 if is_finished else None)


def scored(by_seed, failed=0, **values):
    return SettingScore(
        Setting({f"model.{name}": value for name, value in values.items()}), dict(enumerate(by_seed)), failed
    )


class TestResults:
    def test_intervals_hold_the_mean_as_often_as_they_say(self):
        source = np.random.default_rng(0)
        rows = [scored(draw) for draw in source.normal(3.0, 0.2, (2000, 4))]
        held = [abs(row.mean - 3.0) <= row.half_width for row in rows]
        assert abs(np.mean(held) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / len(rows))

    def test_equal_settings_are_told_apart_as_rarely_as_they_may(self):
        """The seeds vary more than the settings: a test of unpaired scores would hardly ever find a difference."""
        source = np.random.default_rng(1)
        seeds = source.normal(0, 1.0, (2000, 4))
        noise = source.normal(0, 0.01, (2, 2000, 4))
        pairs = [(scored(a), scored(b)) for a, b in zip(seeds + noise[0], seeds + noise[1], strict=True)]
        wrong = np.mean([results.differs(*pair) for pair in pairs])
        assert abs(wrong - 0.05) < 4 * math.sqrt(0.95 * 0.05 / len(pairs))
        better = np.mean([results.differs(a, scored(b + 0.1)) for (a, _), b in zip(pairs, seeds, strict=True)])
        assert better > 0.9

    def test_settings_are_sorted_and_told_apart(self):
        good = scored((1.50, 1.51, 1.52), dim=64)
        close = scored((1.50, 1.53, 1.51), dim=96)
        bad = scored((1.90, 1.91, 1.93), dim=8)
        failed = scored((1.2,), failed=2, dim=99)
        text = "\n".join(results.summary([good, close, bad, failed]))
        assert "best: dim 64" in text
        assert text.splitlines()[1].endswith(": dim 96")
        assert math.isinf(failed.mean)  # two of three seeds diverged: not the best, although the third is low
        lines = results.table([good, close, bad, failed], "val_loss").splitlines()
        assert [line.split() for line in lines if line.startswith("64")] == [["64", "1.5100", "0.0248", "3"]]

    def test_an_infinite_score_is_the_worst(self):
        rows = [scored((1.0, 1.1, 1.2), dim=1), scored((math.inf, 1.0, 1.1), dim=2)]
        assert list(results.summary(rows)) == ["best: dim 1"]
        assert results.differs(*rows)
        assert "inf" in results.table(rows, "loss")

    def test_trials_of_other_values_are_counted(self, tmp_path):
        sweep, folder = parse_args(["--to", str(tmp_path / "s"), *VARY, "--config", "minute"])
        trials = sweep.trials(folder, convert_word)
        for trial in trials:
            trial.run.mkdir(parents=True)
        (folder / "runs" / ".cache").mkdir(exist_ok=True)
        assert list(results.left_out(folder, trials)) == []
        (line,) = results.left_out(folder, trials[:-3])
        assert line.startswith("left out: 3 other trials in ")

    def test_one_seed_proves_nothing(self):
        rows = [scored((1.0 + dim,), dim=dim) for dim in (1, 2)]
        assert "cannot be said from one seed" in "\n".join(results.summary(rows))
        assert math.isnan(rows[0].half_width)


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_same_runs_and_results(tmp_path):
    (tmp_path / "shared.toml").write_text(SHARED)
    (tmp_path / "a.txt").write_text("".join(f"The {n}th line of the text is about {n * n}.\n" for n in range(900)))
    environment = command_environment(tmp_path / "cache")

    def command(folder, vary=VARY):
        program = [sys.executable, "-m", "slm_jax.sweep", "--to", folder]
        return [*program, *vary, "--config", "shared.toml", "--data.files", "a.txt"]

    def start(folder):
        return Process(
            command(folder), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(folder, vary=VARY):
        done = subprocess.run(command(folder, vary), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = run("whole")
    assert "best: lr" in out
    names = sorted(path.name for path in (tmp_path / "whole/runs").iterdir())
    assert len(names) == 8
    rows = list(csv.DictReader((tmp_path / "whole/results.csv").open()))
    for row in rows:
        metrics = read_metrics(tmp_path / "whole/runs" / row["run"] / "metrics.jsonl")
        assert float(row["val_bits_per_byte"]) == metrics[-1]["val_bits_per_byte"]

    kill_at_random_instants(
        lambda: start("killed"), (4, 25), kills=2, begin_again=lambda: shutil.rmtree(tmp_path / "killed")
    )
    run("killed")
    assert (tmp_path / "killed/results.csv").read_text() == (tmp_path / "whole/results.csv").read_text()
    for name in names:
        assert_same_run(tmp_path / "whole/runs" / name, tmp_path / "killed/runs" / name)

    # One value more, which diverges: it is listed, the finished trials are not repeated.
    times = {path: path.stat().st_mtime_ns for path in Path(tmp_path / "whole/runs").glob("*/metrics.jsonl")}
    out = run("whole", ["--vary", "optimizer.lr=0.003,0.01,1e30", "model.dropout=0,0.2", "--seeds", "1"])
    assert {path: path.stat().st_mtime_ns for path in times} == times
    failures = (tmp_path / "whole/failures.json").read_text()
    assert failures.count("lr1e_30") == 2
    assert "best: lr" in out
