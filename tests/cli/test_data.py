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


def corpus_files(cache):
    """Return the files of the only corpus of a cache that is not a lock, by name."""
    (folder,) = (path for path in (cache / "corpora").iterdir() if path.is_dir())
    return folder.name, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("last", [("--merge", "2"), ()])
def test_parts_are_merged_to_the_same_files(command, tmp_path, last):
    """Without --merge, parts are used if all are there."""
    args = ("prepare", "my.txt", "--tokenizer.vocab_size", "400", "--data.cache", "parts")
    assert command(*args, "--part", "0/2") == "the tokenizer is ready\n"
    assert list((tmp_path / "parts" / "tokenizers").glob("*.hybtok"))
    assert not (tmp_path / "parts" / "corpora").exists()
    for number in (2, 1):
        assert command(*args, "--part", f"{number}/2").startswith(f"my.txt: part {number} of 2 has ")
    assert "parts of a corpus, not merged" in command("list", "--data.cache", "parts")
    partial = [tmp_path / "parts" / "corpora" / name for name in ("a.partial", "b.merge.partial")]
    for folder in partial:
        folder.mkdir()
    listed = command("list", "--data.cache", "parts")
    assert "a.partial: incomplete; the command that started it resumes it" in listed
    assert "b.merge.partial: incomplete; the command that started it begins it again" in listed
    for folder in partial:
        folder.rmdir()
    command(*args, *last)
    assert corpus_files(tmp_path / "parts") == corpus_files(tmp_path / "cache")
    assert command(*args, "--part", "1/2") == "this text is prepared already\n"
    assert command(*args, *last)  # once more, without parts


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("prepare", "my.txt", "--part", "4/3"), "--part 4/3 is not I/N: use --part 1/3 to --part 3/3"),
        (("prepare", "my.txt", "--part", "1"), "--part 1 is not I/N"),
        (("prepare", "my.txt", "--part", "1/2", "--merge", "2"), "--part and --merge exclude each other"),
        (("prepare", "my.txt", "--merge", "-1"), "--merge -1 is not a number of parts"),
        (("prepare", "my.txt", "--merge", "2"), "part 1 is missing, part 2 is missing of 2"),
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
