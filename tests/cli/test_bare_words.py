"""Files, runs and prompts that are given without the name of an option."""

import re

import pytest

from slm_jax.cli import (
    benchmark_logger,
    chat,
    check,
    evaluate,
    export,
    generate,
    mfu,
    orchestrator,
    report,
    serve,
    train,
)
from slm_jax.cli.options import read_options, read_options_and_config
from slm_jax.utils.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to a folder with a text, a config, a run and a curriculum."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("text")
    (tmp_path / "[1] a.txt").write_text("text")
    (tmp_path / "my.toml").write_text("[train]\nsteps = 3\n")
    for name, file in (("run", "config.toml"), ("school", "curriculum.toml")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / file).write_text("")
    return tmp_path


def overrides(*args):
    return read_options_and_config(train.Options, args, "x", files=True)[1]


def test_train_takes_text_files(folder):
    assert overrides("my.txt") == {"data.files": ("my.txt",)}
    assert overrides("--resume", "my.txt", "--train.steps", "5", "*.txt") == {
        "data.files": ("my.txt", "*.txt"),
        "train.steps": 5,
    }
    assert overrides("my.txt", "--data.files", "runs", "[1] a.txt")["data.files"] == ("my.txt", "runs", "[1] a.txt")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("our.txt", "there is no file or folder our.txt (in "),
        ("my.toml", "my.toml is a config: --config my.toml"),
        ("minute", "minute is a preset: --config minute"),
        (
            "curriculum-offline",
            "curriculum-offline is a curriculum: python -m slm_jax.orchestrator --config curriculum-off",
        ),
        ("wikipedia:he", "wikipedia:he is a named source: --data.source wikipedia:he"),
        ("hf:a/b", "hf:a/b is a named source: --data.source hf:a/b"),
        ("runs/run", "runs/run is a run: --run runs/run uses it; --init.from_run runs/run starts from its weights"),
        ("runs/school", "runs/school is a run: --run runs/school"),
        ("tinystories", "tinystories is a preset: --config tinystories"),  # and a source, which the preset names
        ("", "a path is empty (an unset variable of the shell?)"),
        ("x" * 5000, "there is no file or folder xxx"),
    ],
)
def test_train_names_the_option_of_any_other_word(folder, word, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        overrides(word)


def test_generate_takes_a_prompt(folder):
    def prompts(*args):
        return read_options(generate.Options, args, "x").prompt

    assert prompts("Hello there") == ("Hello there",)
    assert prompts("Hello") == ("Hello",)
    assert prompts("-") == ("-",)
    assert prompts("--max_tokens", "5", "my file.", "--prompt", "b") == ("my file.", "b")
    assert prompts("--", "--prompt is an option") == ("--prompt is an option",)
    assert prompts("a b", "c") == ("a b", "c")
    for words, message in (
        (["Hello", "there"], r"^Hello there: quote a prompt of several words \('Hello there'\), or give each prompt "),
        (["my.txt"], r"^my\.txt is a file: --prompts my\.txt reads a prompt from each line"),
        (["runs/run", "Hello"], r"^runs/run is a run: --run runs/run uses it"),
        (["-x"], r"^unknown: -x "),
    ):
        with pytest.raises(UserError, match=message):
            prompts(*words)


@pytest.mark.parametrize("command", [benchmark_logger, chat, evaluate, export])
def test_commands_about_a_run_take_its_path(folder, command):
    more = ["--to", "out"] if command is export else []
    assert read_options(command.Options, ["runs/run", *more], "x").run == "runs/run"
    with pytest.raises(UserError, match=r"^runs/run runs/school: --run takes one value, not 2$"):
        read_options(command.Options, ["runs/run", "--run", "runs/school", *more], "x")
    with pytest.raises(UserError, match=r"^my\.txt is a file, not a run directory"):
        read_options(command.Options, ["my.txt", *more], "x")


@pytest.mark.parametrize("command", [check, mfu])
def test_commands_about_a_run_or_a_config_take_the_path_of_a_run(folder, command):
    assert read_options_and_config(command.Options, ["runs/run"], "x")[0].run == "runs/run"
    for word in ("my.toml", "minute"):
        with pytest.raises(UserError, match=f"--config {re.escape(word)}$"):
            read_options_and_config(command.Options, [word], "x")


def test_other_commands(folder):
    assert read_options(report.Options, ["runs/run", "runs/school"], "x").runs == ("runs/run", "runs/school")
    assert read_options(serve.Options, ["runs/run", "--run", "runs/school"], "x").run == ("runs/run", "runs/school")
    with pytest.raises(UserError, match=r"--tasks heldout=my\.txt measures this text$"):
        read_options(evaluate.Options, ["my.txt"], "x")
    assert read_options_and_config(orchestrator.Options, ["my.toml"], "x")[0].config == "my.toml"
    with pytest.raises(UserError, match=r"^runs/school is a run or curriculum: --run runs/school$"):
        read_options_and_config(orchestrator.Options, ["runs/school"], "x")
    (folder / "runs" / "run" / "config.toml").unlink()
    with pytest.raises(UserError, match="no run in runs/run"):
        mfu.main(["--run", "runs/run"])


def test_help_shows_the_words(capsys):
    for options, usage in ((generate.Options, "[TEXT …]"), (serve.Options, "[PATH …]"), (evaluate.Options, "[PATH]")):
        with pytest.raises(SystemExit):
            read_options(options, ["--help"], "command")
        assert f"Usage: command [--option value …] {usage}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    assert "Usage: python -m slm_jax.train [--option value …] [FILE …]\n" in capsys.readouterr().out
