"""python -m tokenizer in a subprocess: results on stdout, errors as one line on stderr with exit status 2."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import Process
from tests.test_tokenizer.samples import LANGUAGES, corpus
from tokenizer import HybridTokenizer, cli
from tokenizer.arguments import build_parser

ROOT = Path(__file__).parents[2]


def run(*arguments, text: str | None = None) -> subprocess.CompletedProcess:
    stdin = None if text is None else text.encode("utf-8")
    command = [sys.executable, "-m", "tokenizer", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command line")
    (folder / "text.txt").write_text(corpus(), encoding="utf-8", newline="")
    path = folder / "my.hybtok"
    done = run("train", f"{folder}/*.txt", "--out", path, "--vocab-size", 700, "--note", "test corpus")
    assert done.returncode == 0, done.stderr
    assert b"700 ids learned from 1 file\n" in done.stdout
    return path


def test_train_a_portable_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text(corpus(), encoding="utf-8", newline="")
    done = run("train", tmp_path / "text.txt", "--out", tmp_path / "p.hybtok", "--vocab-size", 500, "--portable")
    assert done.returncode == 0, done.stderr
    tokenizer = HybridTokenizer.load(tmp_path / "p.hybtok")
    assert tokenizer.portable
    assert tokenizer.vocab_size == 500


@pytest.mark.parametrize("mode", ["flat", "rle"])
def test_decode_inverts_encode(trained, mode):
    text = "\n".join(LANGUAGES.values()) + "  \n"
    ids = run("encode", trained, "--mode", mode, text=text)
    assert ids.returncode == 0
    decoded = run("decode", trained, text=ids.stdout.decode())
    assert decoded.returncode == 0
    assert decoded.stdout.decode() == text


def test_inspect(trained):
    done = run("inspect", trained, "--merges", 5)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode()
    assert "vocab_size=700" in shown
    assert "special tokens: <PAD> " in shown
    assert " <EOS> <RES> <|system|> <|user|> <|assistant|> <|end|>\ncase marks: <UP> <CAPS>\n" in shown
    assert "most used merges" in shown
    uses = [int(line.split()[2]) for line in shown.split("text = left + right\n")[1].split("\n")[:5]]
    assert uses == sorted(uses, reverse=True)


def test_inspect_prints_only_what_was_requested(trained):
    shown = run("inspect", trained, "--text", "Hello the world", "--token", " the").stdout.decode().splitlines()
    assert "' the'" in shown[0]
    assert "[" in shown[-1]
    assert not [line for line in shown if "vocab_size" in line or "first entries" in line]
    shown = run("inspect", trained, "--token", "zzzqqq").stdout.decode().splitlines()
    parts = [line for line in shown if line.startswith("  ") and line[2] != " "]
    assert shown[0] == f"'zzzqqq' is not one token, but encoded as {len(parts)}:"


def test_help_lists_the_commands():
    done = run("--help")
    assert done.returncode == 0
    for word in (b"train", b"encode", b"decode", b"inspect", b"compare", b"--out my.hybtok"):
        assert word in done.stdout


@pytest.mark.parametrize("command", ["train", "encode", "decode", "inspect", "compare", "serve"])
def test_help_of_each_command_has_an_example(command):
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"\n  python -m tokenizer {command} ".encode() in done.stdout or b"| python -m tokenizer" in done.stdout


def test_errors_are_one_line(trained, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").touch()
    invalid = [
        ("encode", tmp_path / "missing.hybtok"),
        ("encode", tmp_path / "latin.txt"),
        ("encode", trained, tmp_path / "missing.txt"),
        ("encode", trained, tmp_path / "latin.txt"),
        ("decode", trained, tmp_path / "latin.txt"),
        ("train", tmp_path / "nothing*.txt", "--out", tmp_path / "x"),
        ("train", tmp_path, "--out", tmp_path / "x"),
        ("train", tmp_path / "empty.txt", "--out", tmp_path / "x"),
        ("train", tmp_path / "latin.txt", "--out", tmp_path / "x"),
        ("train", trained.parent / "text.txt", "--out", tmp_path / "no" / "x"),
        ("train", trained.parent / "text.txt", "--out", tmp_path / "x", "--vocab-size", 5),
        ("train", trained.parent / "text.txt", "--out", tmp_path / "x", "--score", "best"),
        ("train", trained.parent / "text.txt", "--out", ""),
        ("train", trained.parent / "text.txt", "--out", tmp_path),
        ("inspect", trained, "--token", 10**6),
        ("inspect", trained, "--token", "9" * 5000),
        ("compare", tmp_path / "missing.txt"),
        ("compare", tmp_path),
        ("bake",),
        (),
    ]
    for arguments in invalid:
        done = run(*arguments, text="")
        assert done.returncode == 2, arguments
        assert b"Traceback" not in done.stderr
        assert done.stderr.startswith(b"error: ")
        assert done.stderr.count(b"\n") == 1
    for ids in ("1 2 three", "9 5:0", "5:-3", "5:99999999999", "5:" + "9" * 5000):
        done = run("decode", trained, text=ids)
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", ""], "TOKENIZER is empty: give a value"),
        (["encode", "english-8k", ""], "FILE is empty: give a value, or leave it out"),
        (["decode", ""], "TOKENIZER is empty: give a value"),
        (["decode", "english-8k", ""], "FILE is empty: give a value, or leave it out"),
        (["inspect", ""], "TOKENIZER is empty: give a value"),
        (["inspect", "english-8k", "--token", ""], "--token is empty: give a value, or leave it out"),
        (["train", "text.txt", "", "--out", "x"], "FILES is empty: give a value"),
        (["train", "text.txt", "--out", ""], "--out is empty: give a value"),
        (["train", "text.txt", "--out", "x", "--score", ""], "--score is empty: give a value, or leave it out"),
        (["train", "text.txt", "--out", "x", "--boundaries="], "--boundaries is empty: give a value, or leave it out"),
        (["compare", ""], "FILES is empty: give a value"),
        (["compare", "text.txt", "--pretrained", ""], "--pretrained is empty: give a value, or leave it out"),
        (["serve", ""], "TOKENIZERS is empty: give a value, or leave it out"),
    ],
)
def test_empty_values_are_refused(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_empty_text_has_no_tokens(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", (tmp_path / "empty").open("w+"))
    for arguments in (["encode", "english-8k"], ["inspect", "english-8k", "--text", ""]):
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out == "\n"


def test_standard_input_that_cannot_be_read_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", (tmp_path / "writable").open("w"))  # as with `0> FILE`
    assert cli.main(["encode", "english-8k"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read standard input: ")


NUMBERS = {
    "train": ["vocab-size", "k-bases", "max-merges", "min-freq", "phrases", "byte-limit", "processes"],
    "inspect": ["merges", "preview"],
    "compare": ["vocab-size"],
    "serve": ["port"],
}
REQUIRED = {"train": ["text.txt", "--out", "x"], "inspect": ["english-8k"], "compare": ["text.txt"], "serve": []}


def test_all_numbers_are_listed():
    """`NUMBERS` has the options whose placeholder in the help is that of a number."""
    commands = next(action.choices for action in build_parser()._actions if action.choices)
    listed = {
        name: [action.option_strings[0][2:] for action in command._actions if action.metavar in ("N", "SHARE")]
        for name, command in commands.items()
    }
    assert {name: names for name, names in listed.items() if names} == NUMBERS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *[
            ([command, *REQUIRED[command], f"--{name}={word}"], message.format(f"--{name}"))
            for command, names in NUMBERS.items()
            for name in names
            for word, message in [
                ("", "{} is empty: give a value, or leave it out"),
                ("x", "{} x: should be a " + ("number" if name == "phrases" else "whole number")),
            ]
        ],
        (["inspect", "english-8k", "--merges", "-1"], "--merges -1: should be a whole number, 0 or more"),
        (["inspect", "english-8k", "--preview=-"], "--preview -: should be a whole number, 0 or more"),
        (["serve", "--port", "65536"], "--port 65536: should be a whole number from 0 to 65535"),
        (["serve", "--port", "-1"], "--port -1: should be a whole number from 0 to 65535"),
        (["serve", "--port", "80.0"], "--port 80.0: should be a whole number from 0 to 65535"),
        (["inspect", "english-8k", "--merges"], "--merges: expected one argument (python -m tokenizer inspect --help"),
        (["encode", "english-8k", "--mode", "x"], "--mode: invalid choice: 'x' (choose from"),
        (["train", "text.txt"], "the following arguments are required: --out (python -m tokenizer train --help"),
        ([], "the following arguments are required: COMMAND (python -m tokenizer --help"),
    ],
)
def test_invalid_command_lines(words, message, capsys):
    assert cli.main(words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1


def test_a_full_disk_and_closed_streams(trained):
    command = [sys.executable, "-m", "tokenizer", "encode", str(trained)]
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run(command, input=b"text", stdout=full, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    expected = b"error: cannot write to standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, expected)
    done = subprocess.run(["sh", "-c", f"{shlex.join(command)} <&- >&- 2>&-"], cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["encode", "nothing"], ["--help"], ["inspect", "english-8k"]])
def test_the_status_is_the_same_where_nothing_can_be_written(words, unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "tokenizer", *words]
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run(command, stdout=full, stderr=full, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 2


def test_ctrl_c_prints_one_line(trained):
    command = [sys.executable, "-m", "tokenizer", "encode", str(trained)]
    with Process(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdin.write(b" " * 1_000_000)  # more than a pipe holds: it has started to read
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert (process.returncode, stderr) == (130, b"stopped\n")


def test_ctrl_c_during_the_imports_prints_one_line(tmp_path):
    (tmp_path / "argparse.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tokenizer", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"stopped\n")


def test_importing_does_not_load_numpy():
    code = (
        "import sys, tokenizer; t = tokenizer.HybridTokenizer; sys.exit('numpy' in sys.modules or 'jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
