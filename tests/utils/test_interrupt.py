"""Ctrl-C between the start of a command and its end: one line, never a traceback."""

import signal
import subprocess
import sys

import pytest

from tests.processes import Process

COMMAND = """
import os, signal, sys, time
from slm_jax.cli import run_main
run_main(sys.argv[1])
"""


def run(tmp_path, module):
    """Run a module as a command; return its status and what it wrote to stderr."""
    (tmp_path / "command.py").write_text(module)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}){COMMAND}", "command"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


INTERRUPT = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\n"


def test_while_the_command_is_imported(tmp_path):
    assert run(tmp_path, INTERRUPT + "time.sleep(9)") == (130, "stopped\n")


@pytest.mark.parametrize("converts", [False, True])
def test_an_import_inside_main_is_not_interrupted(tmp_path, converts):
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\n"
        "except KeyboardInterrupt as error:\n    " + ("raise ImportError('lost') from error" if converts else "pass")
    )
    main = "import time\ndef main():\n    import slow\n    time.sleep(9)\n"
    assert run(tmp_path, main) == (130, "stopped\n")


def test_a_second_one_does_not_wait_for_the_import(tmp_path):
    (tmp_path / "slow.py").write_text(f"{INTERRUPT}os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\nprint('late')")
    assert run(tmp_path, "def main():\n    import slow\n") == (130, "stopped\n")


def test_main_can_clean_up(tmp_path):
    main = f"import sys\ndef main():\n    try:\n        {INTERRUPT.replace(chr(10), '; ')}time.sleep(9)\n"
    assert run(tmp_path, main + "    finally:\n        print('clean', file=sys.stderr)\n") == (130, "clean\nstopped\n")


def test_while_the_interpreter_shuts_down(tmp_path):
    main = f"import atexit\ndef late():\n    {INTERRUPT.replace(chr(10), '; ')}time.sleep(9)\n"
    assert run(tmp_path, main + "def main():\n    atexit.register(late)\n") == (130, "stopped\n")


def test_an_ignored_signal_stays_ignored(tmp_path):
    command = [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN){COMMAND}", "command"]
    (tmp_path / "command.py").write_text(INTERRUPT + "def main():\n    print('done')\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_no_command_prints_a_traceback():
    for tenths in (1, 2, 3, 5):
        command = [sys.executable, "-m", "slm_jax.generate", "--prompt", "x", "--run", "nowhere"]
        with Process(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                process.wait(tenths / 10)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
            assert "Traceback" not in process.stderr.read()
