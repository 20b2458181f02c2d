"""`slm` and `python -m slm_jax`: the list of commands, and each of them as a subcommand."""

import json
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


# Prints the output of `python -m` for each of the given command lines, and which large libraries were imported.
# Statuses other than 0 and 2 (an invalid option) fail.
PROGRAM = """
import contextlib, io, json, runpy, sys

outputs = []
for module, *args in json.loads(sys.argv[1]):
    sys.argv = [module, *args]
    err = io.StringIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())) as out, contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert end.code in (None, 0, 2), module
    out.seek(0)
    outputs.append(out.read() + err.getvalue())
libraries = [name for name in ("numpy", "jax", "flax", "orbax", "matplotlib", "tyro") if name in sys.modules]
print(json.dumps({"outputs": outputs, "libraries": libraries}))
"""


# Command lines that are refused before anything is computed, with the beginning of the error.
REFUSED = {
    "slm_jax.train --train.stepz 5": "error: unknown option --train.stepz",
    "slm_jax.train --train.steps -5": "error: config: train.steps = -5",
    "slm_jax.check --model.dim 100 --model.heads 3": "error: config: model.dim 100",
    "slm_jax.generate --prompt Once --run runs/there-is-none": "error: no run in runs/there-is-none",
}


@pytest.fixture(scope="module")
def helps():
    """Return the help of each command under `slm` and as a module, the errors of REFUSED, and imported libraries."""
    lines = [["slm_jax", name, "--help"] for name in COMMANDS]
    lines += [[name if name == "tokenizer" else f"slm_jax.{name}", "--help"] for name in COMMANDS]
    lines += [line.split() for line in REFUSED]
    command = [sys.executable, "-c", PROGRAM, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_each_is_the_command_of_its_module(helps):
    under, direct = helps["outputs"][: len(COMMANDS)], helps["outputs"][len(COMMANDS) : 2 * len(COMMANDS)]
    for name, text, other in zip(COMMANDS, under, direct, strict=True):
        assert len(text.splitlines()) > 5, name
        assert text.splitlines()[2:] == other.splitlines()[2:], name


def test_help_and_errors_import_no_library_that_takes_long(helps):
    errors = helps["outputs"][2 * len(COMMANDS) :]
    for error, start in zip(errors, REFUSED.values(), strict=True):
        assert error.startswith(start)
    assert helps["libraries"] == []


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
