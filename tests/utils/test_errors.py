"""Errors of the disk are recognized, also where a library raises its own, and end a command with one line."""

import errno
import os
import subprocess
import sys

import pytest

from slm_jax.utils.errors import disk_problem, user_message

# What TensorStore raised with a file-size limit (version 0.1.80).
TENSORSTORE = (
    'OUT_OF_RANGE: Error writing "x/0.0" in OCDBT database at local file "a/state/": Failed writing: "a/d/b4": '
    "Failed to write 128086 bytes to file 14: File too large [os_error_code='27']"
)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "no space left on the disk"), (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f")],
)
def test_a_full_disk_a_quota_and_a_size_limit_are_one_line(number, said):
    own = OSError(number, os.strerror(number), "a/b.bin")
    assert said in user_message(own)
    assert "(a/b.bin)" in user_message(own)
    wrapped = ValueError(f"INTERNAL: write failed: {os.strerror(number)}")
    assert said in user_message(wrapped)
    cause = RuntimeError("failed")
    cause.__cause__ = own
    assert said in user_message(cause)


def test_a_refused_file_is_one_line():
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/a/x")
    assert user_message(error) == (
        "cannot use runs/a/x: Permission denied; change its permissions, or name another place"
    )
    assert "Read-only file system" in user_message(OSError(errno.EROFS, os.strerror(errno.EROFS), "x"))
    assert user_message(PermissionError(errno.EPERM, "of no file")) is None
    assert user_message(FileNotFoundError(errno.ENOENT, "a mistake in the code", "x")) is None


def test_other_errors_are_no_problem_of_the_disk():
    assert "ulimit -f" in disk_problem(ValueError(TENSORSTORE))
    assert disk_problem(PermissionError(errno.EACCES, "no")) is None
    assert user_message(ValueError("too large")) is None


SAVE = """
import resource, sys, jax.numpy as jnp, numpy as np
from slm_jax.config.schema import CheckpointConfig
from slm_jax.run.checkpoint import Checkpoints

def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    arrays = {str(i): jnp.asarray(np.random.default_rng(i).normal(size=(80, 80))) for i in range(12)}
    with Checkpoints(sys.argv[1], CheckpointConfig()) as checkpoints:
        checkpoints.save(1, arrays, {})
"""
LEAVE = """
import threading, time
from slm_jax.utils.errors import UserError

def main():
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise UserError("a save failed")
"""


@pytest.mark.parametrize(("source", "said"), [(SAVE, "ulimit -f"), (LEAVE, "a save failed")], ids=["save", "leave"])
def test_a_failed_save_ends_the_command_with_one_line(tmp_path, source, said):
    """Without tracebacks from the threads of Orbax, and without waiting for them for minutes."""
    (tmp_path / "failing.py").write_text(source)
    started = [sys.executable, "-c", "from slm_jax.cli import run_main; run_main('failing')", str(tmp_path / "a")]
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        started, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
