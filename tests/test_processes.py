"""The helpers that start and kill processes leave none behind."""

import contextlib
import os

import pytest

from tests.processes import kill_at


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

    with pytest.raises((AssertionError, ValueError)):
        kill_at(command, [condition], dict(os.environ))
    monkeypatch.undo()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(started.read_text()), 9)
