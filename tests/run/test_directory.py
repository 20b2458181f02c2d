"""Run directories: which one is found, and which options bind a run."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slm_jax.cli import train as train_command
from slm_jax.cli.train import parse_args
from slm_jax.config.schema import Config
from slm_jax.performance import flops
from slm_jax.report.run_data import read_report_data
from slm_jax.run.directory import Run, find_run
from slm_jax.run.naming import new_run, removed_if_unused
from slm_jax.training.train import train
from slm_jax.utils import process
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import locked_folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three runs in runs/: `old` with a checkpoint, `refused` without, and `new`, the newest, without."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "refused", "old")):
        run = Run(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        run.save_config(Config())
        os.utime(run.path, (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "old" / "checkpoints" / "7").mkdir(parents=True)
    os.utime(tmp_path / "runs" / "old", (1e8, 1e8))
    return tmp_path / "runs"


def test_resume_takes_the_newest_run_with_a_checkpoint(runs):
    assert find_run(None).path.name == "new"
    assert find_run(None, trained=True).path.name == "old"
    assert parse_args(["--resume"])[1].path.name == "old"
    assert parse_args(["--resume", "--run", "runs/new"])[1].path.name == "new"
    (runs / "old" / "checkpoints" / "7").rmdir()
    with pytest.raises(UserError, match="there is no run with a checkpoint in"):
        parse_args(["--resume"])


def test_a_damaged_run_is_skipped_unless_it_is_named(runs, caplog):
    (runs / "curriculum" / "stages" / "01-a").mkdir(parents=True)
    (runs / "curriculum" / "stages" / "01-a" / "config.toml").write_text("[train\n")
    config = Run(runs / "new").config
    config.write_text("".join(config.read_text().splitlines(keepends=True)[:-3]))
    os.utime(runs / "new", (1e9, 1e9))
    assert find_run(None).path.name == "refused"
    assert find_run(None, trained=True).path.name == "old"
    assert parse_args(["--resume"])[1].path.name == "old"
    warnings = [record.getMessage() for record in caplog.records]
    assert sum("runs/new is skipped" in each and "its end is missing" in each for each in warnings) == 3
    assert sum("runs/curriculum is skipped" in each and "not valid TOML" in each for each in warnings) == 3
    assert find_run("runs/refused").path.name == "refused"
    with pytest.raises(UserError, match="its end is missing"):
        parse_args(["--resume", "--run", "runs/new"])
    with pytest.raises(UserError, match=r"runs/curriculum/.* is not valid TOML"):
        find_run("runs/curriculum")
    with pytest.raises(UserError, match=r"no run in missing"):
        find_run("missing")


def test_options_bind_when_something_depends_on_them(runs):
    run = Run(runs / "new")
    config = Config()
    other = Config.load("quickstart", **{"model.dim": 384, "data.separator": "---", "data.mode": "segmented"})
    other = other.model_copy(update={"tokenizer": config.tokenizer})
    assert run.conflicts(config, other) == {}
    run.corpus.mkdir()
    assert set(run.conflicts(config, other)) == {"data.separator"}
    (run.path / "checkpoints" / "1").mkdir(parents=True)
    assert {"data.separator", "data.mode", "model.dim"} <= set(run.conflicts(config, other))
    resumable = config.model_copy(update={"log": other.log, "mesh": other.mesh, "checkpoint": other.checkpoint})
    run.begin(resumable)
    with pytest.raises(UserError, match=r"model\.dim: 192 saved, 384 current"):
        run.begin(other)
    assert run.read_config() == config  # with a checkpoint, the caller saves it once the run is restored


def test_a_config_that_is_cut_or_changed_is_refused(tmp_path):
    """Cut at the end of a line it is valid TOML, whose missing options would silently be the defaults."""
    run = Run(tmp_path)
    config = Config.load("quickstart", **{"data.separator": "# end", "data.files": ("a.txt", "שלום")})
    run.save_config(config)
    assert run.read_config() == config
    assert Config.load(run.config) == config  # as a preset
    text = run.config.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    for count in range(len(lines)):
        run.config.write_text("".join(lines[:count]), encoding="utf-8")
        with pytest.raises(UserError, match="is damaged: its end is missing"):
            run.read_config()
    run.config.write_text(text.replace("dim = 192", "dim = 193"), encoding="utf-8")
    with pytest.raises(UserError, match=r"differs from its checksum.* shorten its last line to '# end'"):
        run.read_config()
    edited = [line.replace("dim = 192", "dim = 96") for line in lines[:-1]]
    run.config.write_text("".join([*edited, "# end\n"]), encoding="utf-8")
    assert run.read_config().model.dim == 96


def test_a_config_of_an_earlier_version_has_no_checksum(tmp_path):
    run = Run(tmp_path)
    stored = Run(Path(__file__).parent / "run_0.1.0").config.read_text()
    run.config.write_text(stored)
    assert run.read_config().model.dim == 16
    lines = stored.splitlines(keepends=True)
    for count in range(len(lines)):
        run.config.write_text("".join(lines[:count]))
        with pytest.raises(UserError, match="is damaged"):
            run.read_config()


def test_other_options_of_a_run_are_named_as_they_were_given(tmp_path):
    run = Run(tmp_path / "run")
    config = Config.load("quickstart", **{"train.batch_size": 16, "train.microbatch": 8, "model.dim": 96})
    run.path.mkdir()
    run.save_config(config)
    smaller = ["--run", str(run.path), "--train.batch_size", "4"]
    assert parse_args(smaller)[0].train.microbatch == "auto"  # nothing depends on the saved values yet
    (run.checkpoints / "5").mkdir(parents=True)
    saved_current = r"One option differs:\n  train\.batch_size: 16 saved, 4 current$"
    with pytest.raises(UserError, match=saved_current):
        parse_args(smaller)
    with pytest.raises(UserError, match=r"One option differs:\n  model\.dim: 96 saved, 100 current$"):
        parse_args(["--run", str(run.path), "--model.dim", "100"])  # not divisible by the saved model.heads
    more = ["--run", str(run.path), "--train.batch_size", "16", "--train.steps", "7", "--checkpoint.folder", "there"]
    assert parse_args(more)[0].train.steps == 7


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "python-docs"),
        ({"data.files": ("../My Plays/*.txt",), "model.mlp_dim": 100}, "my-plays"),
        ({"data.files": ("texts/plays.v2.txt.gz", "b.txt"), "model.depth": 10}, "plays"),
        ({"data.source": "hf:owner/Name:config", "model.dim": 64, "model.heads": 2}, "name-config"),
        ({"data.mix": ("python-docs=1", "a.txt=2"), "model.dim": 2304, "model.heads": 18, "model.depth": 60}, "mix"),
        ({"model.heads": 6, "model.kv_heads": 1, "model.tie_weights": False}, "python-docs"),
    ],
)
def test_names_of_new_runs_are_short(tmp_path, monkeypatch, fields, name):
    monkeypatch.chdir(tmp_path)
    config = Config.load(**fields)
    match = re.fullmatch(rf"runs/{name}-(\d{{1,3}})([kmb])-\d{{4}}", str(new_run(config).path))
    parameters = flops.parameters(config.model, config.tokenizer.vocab_size)
    unit = {"k": 1e3, "m": 1e6, "b": 1e9}[match[2]]
    assert abs(int(match[1]) * unit - parameters) <= 0.5 * unit + 0.03 * parameters


def test_runs_that_start_at_the_same_time_get_different_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: new_run(Config()), range(40)))
    assert len({run.path for run in runs}) == 40
    ends = {re.fullmatch(r"python-docs-\d+m-\d{4}-?(\d*)", run.path.name)[1] for run in runs}
    assert ends == {"", *(str(number) for number in range(2, 41))}
    run = runs[0]
    assert run.is_new()
    with pytest.raises(UserError, match="there is no run in"):
        find_run(None)
    run.begin(Config())
    assert not run.is_new()
    assert [path.name for path in run.path.iterdir()] == ["config.toml"]
    mine = Run(tmp_path / "mine")
    assert mine.is_new()
    mine.path.mkdir()
    assert not mine.is_new()  # made by the user


def test_directory_of_a_run_without_text_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        train(Config.load(**{"data.files": ("empty.txt",), "data.cache": "cache"}))
    assert list((tmp_path / "runs").iterdir()) == []


def test_directory_that_was_not_used_is_removed(tmp_path, monkeypatch):
    """Whatever ends the command between the creation of the directory and the first file of the run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n")

    def raise_error(error):
        raise error

    monkeypatch.setattr(train_command.os, "_exit", lambda status: raise_error(SystemExit(status)))
    for error, end in ((UserError("refused"), UserError), (KeyboardInterrupt(), SystemExit), (OSError(), OSError)):
        monkeypatch.setattr(process, "tune_process", lambda *_, error=error: raise_error(error))
        with pytest.raises(end):
            train_command.main(["a.txt"])
        assert list((tmp_path / "runs").iterdir()) == []
    config = Config.load(**{"data.files": ("a.txt",), "checkpoint.folder": "saved"})
    with locked_folder(tmp_path / "saved", "", ""), pytest.raises(UserError, match="another process is saving"):
        train(config)
    assert list((tmp_path / "runs").iterdir()) == []
    run = new_run(config)
    with removed_if_unused(run):
        (run.path / "notes.txt").write_text("mine")
    assert [path.name for path in run.path.iterdir()] == ["notes.txt"]


def test_directory_left_by_a_killed_process_is_ignored(runs):
    unused = new_run(Config())
    assert find_run(None).path.name == "new"
    for search in (find_run, read_report_data):
        with pytest.raises(UserError, match=f"no run in {unused.path} "):
            search(str(unused.path) if search is find_run else unused.path)
    assert new_run(Config()).path.name == f"{unused.path.name}-2"
    with unused.lock():
        unused.begin(Config())
    assert find_run(None).path == unused.path


def test_files_in_an_unused_directory_are_never_removed(tmp_path, monkeypatch):
    """They are the user's: the directory was left by a killed process, and is no longer empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n")
    run = new_run(Config())
    (run.path / "notes.txt").write_text("mine")
    assert not run.is_new()
    with pytest.raises(UserError, match="holds files but no run"):
        train(Config.load(**{"data.files": ("a.txt",), "data.cache": "cache"}), run.path)
    assert (run.path / "notes.txt").read_text() == "mine"
