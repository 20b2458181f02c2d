"""Tests leave no process behind, whether they pass or fail."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.processes import Process, ended_processes, kill_at

ROOT = Path(__file__).parent


@pytest.mark.parametrize("instant", ["raises", "never"])
def test_a_failed_test_leaves_no_process(instant, tmp_path, monkeypatch):
    started = tmp_path / "pid"
    command = ["sh", "-c", f"echo $$ > {started}.new; mv {started}.new {started}; exec sleep 60"]

    def condition():
        if instant == "raises" and started.exists():
            raise ValueError
        if instant == "never" and started.exists():
            monkeypatch.setattr("tests.processes.time.monotonic", lambda: float("inf"))
        return False

    with pytest.raises((AssertionError, ValueError)), ended_processes():
        kill_at(command, [condition], dict(os.environ))
    monkeypatch.undo()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(started.read_text()), 9)


def test_a_failed_block_kills_its_process_at_once():
    with pytest.raises(ValueError, match="a failed assertion"), Process(["sleep", "60"]) as process:
        raise ValueError("a failed assertion")
    assert process.returncode == -signal.SIGKILL


def test_what_runs_at_the_end_is_killed_and_what_ran_before_is_not():
    with ended_processes():
        before = Process(["sleep", "60"])
        with ended_processes():
            within = Process(["sleep", "60"])
            ended = Process(["true"])
            assert ended.wait(10) == 0
        assert within.returncode == -signal.SIGKILL
        assert (ended.returncode, before.poll()) == (0, None)
    assert before.returncode == -signal.SIGKILL


def test_every_test_is_watched(request):
    assert "no_process_is_left" in request.fixturenames
    plain = "subprocess." + "Popen("
    files = [path for path in ROOT.rglob("test_*.py") if plain in path.read_text(encoding="utf-8")]
    assert files == [ROOT / "test_launch.py"]  # in a program that a test runs
