"""Commands run with closed standard streams, and end with the same status where they cannot write to them."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLOSED = "[sys.stdin.read(), sys.stdin.fileno(), sys.stdout.fileno(), sys.stderr.fileno()]"


def status(folder, statement, shell, unbuffered=""):
    """Return the exit status of a command whose `main` is a statement.

    Args:
        folder: Folder for the command's module.
        statement: The statement.
        shell: Shell command, with {} in place of the command.
        unbuffered: Value of PYTHONUNBUFFERED.
    """
    header = "import os, signal, sys, time\nfrom slm_jax.utils.errors import UserError\n"
    (folder / "command.py").write_text(f"{header}\ndef main():\n    {statement}\n")
    words = [sys.executable, "-c", "from slm_jax.cli import run_main; run_main('command')"]
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "PYTHONUNBUFFERED": unbuffered}
    script = "set -o pipefail; " + shell.format(shlex.join(words))
    return subprocess.run(["bash", "-c", script], cwd=folder, env=environment, timeout=60, check=False).returncode


def test_closed_streams_are_the_null_device(tmp_path):
    assert status(tmp_path, f"print({CLOSED}); open('out', 'w').write('done')", "{} <&- >&- 2>&-") == 0
    assert (tmp_path / "out").read_text() == "done"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("statement", "shell", "expected"),
    [
        ("raise UserError('a mistake')", "{} 2>/dev/full", 2),
        ("raise UserError('a mistake')", "{} >/dev/full 2>/dev/full", 2),
        ("raise UserError('a mistake')", "{} 2> >(true)", 2),
        ("print('progress', file=sys.stderr)", "{} 2>/dev/full", 2),
        ("print('result')", "{} >/dev/full", 2),
        ("print('result')", "{} >/dev/full 2>/dev/full", 2),
        ("print('help'); sys.exit(0)", "{} >/dev/full", 2),
        ("print('result'); return 1", "{} 2>/dev/full", 1),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", "{} 2>/dev/full", 130),
        ("time.sleep(0.5); print('result')", "{} | true", 141),
        ("time.sleep(0.5); print('progress', file=sys.stderr)", "{} 2>&1 | true", 141),
        ("time.sleep(0.5); raise UserError('a mistake')", "{} 2>&1 | true", 2),
    ],
)
def test_the_status_where_output_cannot_be_written(tmp_path, statement, shell, expected, unbuffered):
    assert status(tmp_path, statement, shell, unbuffered) == expected


def test_ctrl_c_before_the_imports_where_it_cannot_be_reported(tmp_path):
    statement = "pass\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    assert status(tmp_path, statement, "{} 2>/dev/full") == 130
