"""`python -m slm_jax.data`: the text of a run, of a folder, of files, and the options of each command."""

import sys

import pytest

from slm_jax.cli import data
from slm_jax.config.schema import Config
from slm_jax.data.prepare import prepare
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in a folder with a text and an untrained run, and returns its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "show_log", lambda: None)
    text = "".join(f"Line {i}: the quick brown fox jumps over {i * 7 % 13} lazy dogs.\n" for i in range(900))
    (tmp_path / "my.txt").write_text(text)
    values = {"data.files": ("my.txt",), "data.cache": "cache", "tokenizer.vocab_size": 400}
    config = Config.load(**values, **{"train.batch_size": 4, "train.sequence_length": 32})
    run = Run(tmp_path / "runs" / "mine")
    run.path.mkdir(parents=True)
    run.save_config(config)
    prepare(config, run)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["data", *args])
        data.main()
        return capsys.readouterr().out

    return call


def test_the_text_of_a_run_is_inspected_with_its_options(command):
    shown = command("inspect", "--run", "runs/mine")
    assert " in runs/mine/corpus\n" in shown
    assert "packed at 4 x 32" in shown
    assert command("inspect", "runs/mine") == shown
    assert "packed at 8 x 32" in command("inspect", "runs/mine", "--train.batch_size", "8")
    assert "packed at 16 x 256" in command("inspect", "runs/mine/corpus")  # a folder has no options of its own


def test_the_text_of_a_run_is_prepared_with_its_tokenizer(command):
    folder = command("prepare", "--run", "runs/mine").splitlines()[-1]
    assert folder.startswith("cache/")
    assert command("inspect", folder, "--train.batch_size", "4", "--train.sequence_length", "32")
    assert command("prepare", "my.txt", "--data.cache", "cache", "--tokenizer.vocab_size", "400").endswith(
        f"{folder}\n"
    )
    shown = command("inspect", "my.txt", "--data.cache", "cache", "--tokenizer.vocab_size", "400")
    assert shown.splitlines()[0].endswith(f" in {folder}")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("inspect", "none"), "no file, folder, run or prepared text 'none' "),
        (("inspect", "--run", "none"), r"no run in none .*existing runs: runs/mine"),
        (("prepare", "--run", "none"), "no run in none"),
        (("inspect", "runs/mine", "my.txt"), "is a run"),
        (("inspect", "--run", "runs/mine", "my.txt"), "inspect one run at a time"),
        (("list", "--model.dim", "32"), "unknown option --model.dim"),
        (("lst",), "unknown command lst: use list, prepare, inspect"),
    ],
)
def test_mistakes_are_named(command, args, message):
    with pytest.raises(UserError, match=message):
        command(*args)


def test_a_run_without_its_text(command, tmp_path):
    (tmp_path / "runs" / "mine" / "corpus").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="data prepare --run runs/mine makes it"):
        command("inspect", "--run", "runs/mine")
    assert "all checksums match" in command("inspect", "elsewhere")


@pytest.mark.parametrize("name", ["list", "prepare", "inspect"])
def test_help_lists_the_options_that_are_used(command, capsys, name):
    with pytest.raises(SystemExit):
        command(name, "--help", "all")
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}
    sections = {option.partition(".")[0] for option in names if "." in option}
    assert (
        sections
        == {
            "list": {"--data"},
            "prepare": {"--data", "--tokenizer", "--init"},
            "inspect": {"--data", "--tokenizer", "--init", "--train"},
        }[name]
    )
    assert ("--run" in names) == (name != "list")
