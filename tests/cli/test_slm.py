"""`slm` and `python -m slm_jax`: the list of commands, and each of them as a subcommand."""

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from slm_jax.cli.slm import COMMANDS

ROOT = Path(__file__).parents[2]


def slm(*args):
    command = [sys.executable, "-m", "slm_jax", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_commands_are_listed_at_once():
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        listed = slm()
        seconds.append(time.monotonic() - start)
    assert listed.returncode == 0, listed.stderr
    assert slm("--help").stdout == listed.stdout
    for name, purpose in COMMANDS.items():
        assert f"  {name} " in listed.stdout
        assert purpose in listed.stdout
    assert min(seconds) < 0.5


def test_the_list_is_that_of_the_front_page():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Commands")[2]
    for name in COMMANDS:
        assert f"| `{'' if name == 'tokenizer' else 'slm_jax.'}{name}` |" in table


@pytest.mark.parametrize("name", COMMANDS)
def test_each_is_the_command_of_its_module(name):
    module = name if name == "tokenizer" else f"slm_jax.{name}"
    direct = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False)
    under = slm(name, "--help")
    assert under.returncode == direct.returncode == 0, under.stderr
    assert under.stdout.splitlines()[2:] == direct.stdout.splitlines()[2:]


def test_options_and_status_are_passed_on():
    wrong = slm("train", "--train.stepz", "5")
    assert wrong.returncode == 2
    assert "unknown option --train.stepz, perhaps you meant --train.steps" in wrong.stderr
    unknown = slm("trian")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("error: unknown command trian, perhaps you meant train; the commands are train,")


def test_the_console_script_is_declared():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"slm": "slm_jax.cli.slm:run"}
