"""Processes of a run agree, or end with an error that names the one that differs."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from slm_jax import load_run
from slm_jax.distributed import software
from slm_jax.run import checksums
from slm_jax.run.directory import Run
from tests.distributed.test_multihost import FIELDS, finish, rows, wait_for_step
from tests.processes import Process, command_environment

ROOT = Path(__file__).parents[2]


def start(folder, run, processes, *more, faults=(), paths=(), command="train", fields=FIELDS):
    """Start the processes of one run on a device each.

    Args:
        faults: Faults of each process, see `launch`.
        paths: A folder for each process that its program is imported from; empty: this project.
    """
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for i in range(processes):
        path = [str(paths[i])] if paths else []
        environment = command_environment(folder / "cache")
        environment["PYTHONPATH"] = os.pathsep.join([*path, str(ROOT)])
        together = ["--coordinator", address, "--processes", processes, "--process", i] if processes > 1 else []
        options = [command, "--run", run, *fields, *together, *more]
        words = [sys.executable, "-m", "tests.distributed.launch", json.dumps(faults[i] if faults else {}), *options]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(Process(list(map(str, words)), cwd=folder, env=environment, **pipes))
    return started


EXCHANGES = """
import sys
from slm_jax.distributed import agreement, lifecycle, multihost
from slm_jax.utils.errors import UserError
lifecycle.initialize(sys.argv[1], 3, int(sys.argv[2]))
me = multihost.process_index()
assert "xla_bridge._backends" not in sys.modules
assert agreement.from_first("a", lambda: [me, float("nan") if me else 0.1]) == [0, 0.1]
assert agreement.gather("b", lambda: {"me": me}) == [{"me": 0}, {"me": 1}, {"me": 2}]
assert agreement.minimum("c", (1 << 40) - me) == (1 << 40) - 2

def fail_in(process):
    if me == process:
        raise UserError("no such file")
    return me

def error_of(call):
    try:
        call()
    except (UserError, RuntimeError) as error:
        return str(error)

assert error_of(lambda: agreement.gather("d", lambda: fail_in(2))) == "process 2: no such file"
assert error_of(lambda: agreement.from_first("e", lambda: fail_in(0))) == "no such file"
assert agreement.from_first("f", lambda: fail_in(1)) == 0
outcome = agreement.attempt("g", lambda: 1 // (me - 1) and me)
assert outcome.errors == {1: "ZeroDivisionError: integer division or modulo by zero"}
assert (outcome.value, type(outcome.error)) == ((me, type(None)) if me != 1 else (None, ZeroDivisionError))
agreement.require_same("the options", lambda: {"x": (1, 2), "y": None}, "fix it")
different = {"x": 1, "y": 2} | ({"x": 7, "z": "a"} if me == 2 else {})
assert error_of(lambda: agreement.require_same("the options", lambda: different, "fix it")) == (
    "the options of process 2 differ: x is 1 in process 0, 7 in process 2; z is not given in process 0, 'a' in "
    "process 2: fix it")
lost = error_of(lambda: agreement.gather("here" if me else "there", lambda: me))
assert "the processes are at different points: 'there' in process 0, 'here' in process 1" in lost or me, lost
print("agreed")
"""


def test_exchanges_of_three_processes():
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [[sys.executable, "-c", EXCHANGES, address, str(i)] for i in range(3)]
    started = [Process(each, env=environment, **pipes) for each in words]
    outputs = [each.communicate(timeout=240) for each in started]
    assert [out.splitlines()[-1:] for out, _ in outputs] == [["agreed"]] * 3, outputs


THREE = ("--train.batch_size", 12, "--checkpoint.keep", 3, "--checkpoint.keep_best", 1, "--model.dropout", 0.1)


def parameters(folder, run):
    return [np.asarray(x) for x in jax.tree.leaves(load_run(str(folder / run)).model)]


@pytest.mark.slow
def test_processes_with_read_errors_stale_lookups_and_little_memory_agree(folder):
    """Steps, microbatch and data are those of all; a run that falls back equals one that never went further."""
    # A step of 12 sequences takes 2.2 MB of each device, of 6 sequences 1.4 MB, and nine tenths of 1.9 MB are free.
    faults = [{}, {"stale": str(folder / "run")}, {"memory": 1_900_000}]
    started = start(folder, "run", 3, *THREE, "--train.steps", 15, faults=faults)
    for status, error in finish(started):
        assert status == 0, error
    assert Run(folder / "run").read_config().train.microbatch == 6
    assert [row["step"] for row in rows(folder, "run")] == list(range(1, 16))
    shutil.copytree(folder / "run", folder / "other")
    for step in (10, 15):
        shutil.rmtree(folder / "other" / "checkpoints" / str(step))

    # 15 is complete, but process 2 cannot read its arrays; process 1 cannot read 10 at all.
    faults = [{}, {"unreadable": "checkpoints/10/"}, {"unrestorable": "checkpoints/15/"}]
    results = finish(start(folder, "run", 3, *THREE, "--train.steps", 18, faults=faults))
    errors = [error for _, error in results]
    assert [status for status, _ in results] == [0, 0, 0], errors
    assert "continuing after step 5" in errors[0]
    assert "\ncheckpoint 10 is skipped: process 1 cannot read it (OSError: [Errno 5] injected read error" in errors[0]
    assert "\ncheckpoint 15 is skipped: process 2 cannot read it (OSError: [Errno 5] injected read error" in errors[0]
    assert "process 1: checkpoint 10 is corrupt and skipped (OSError: [Errno 5] injected read error" in errors[1]
    assert "process 2: checkpoint 15 is corrupt and skipped (OSError: [Errno 5] injected read error" in errors[2]
    assert (folder / "run" / "checkpoints" / "damaged" / "15").is_dir()

    for status, error in finish(start(folder, "other", 3, *THREE, "--train.steps", 18)):
        assert status == 0, error
    assert rows(folder, "run") == rows(folder, "other")
    pairs = zip(parameters(folder, "run"), parameters(folder, "other"), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_other_sources_on_one_host_are_refused(folder):
    for package in ("slm_jax", "tokenizer"):
        shutil.copytree(ROOT / package, folder / "changed" / package, ignore=shutil.ignore_patterns("__pycache__"))
    optimizer = folder / "changed" / "slm_jax" / "training" / "optimizer.py"
    optimizer.write_text(optimizer.read_text() + "\nRATE = 1.01\n")
    results = finish(start(folder, "run", 2, "--train.steps", 4, paths=[ROOT, folder / "changed"]))
    assert [status for status, _ in results] == [2, 2], results
    for _, error in results:
        assert "error: the software of process 1 differ: slm_jax/training/optimizer.py is" in error
        assert "in process 1: install the same versions and sources" in error
    assert not (folder / "run").exists()


def test_software_lists_versions_sources_and_settings(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_force_host_platform_device_count=2 --xla_dump_to=/x --xla_a=1")
    found = software.software()
    assert found["jax"] == jax.__version__
    assert found["numpy"] == np.__version__
    assert len(found["tokenizer/vocabulary.py"]) == 12
    assert found["jax_threefry_partitionable"] is True
    assert found["XLA_FLAGS"] == ["--xla_a=1", "--xla_b=1"]


@pytest.mark.slow
def test_nan_in_one_process_is_skipped_by_all(folder):
    """The update is left out in every process: the parts of the state that the others hold stay consistent."""
    options = ("--train.steps", 8, "--health.on_nan", "skip", "--mesh.fsdp")
    faults = [{"nan": [5, 6]}] * 2  # row 6 of 8 is computed by process 1
    for run, processes in (("two", 2), ("one", 1)):
        for status, error in finish(start(folder, run, processes, *options, processes, faults=faults)):
            assert status == 0, error
        records = rows(folder, run)
        assert [row["skipped"] for row in records] == [0, 0, 0, 0, 0, 1, 1, 1]
        assert records[5].pop("loss") is records[5].pop("grad_norm") is None
    pairs = zip(parameters(folder, "two"), parameters(folder, "one"), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


STAGES = """
[[stages]]
name = "first"
train.steps = 14

[[stages]]
name = "second"
train.steps = 12
optimizer.lr = 0.003
"""


@pytest.mark.slow
def test_curriculum_of_two_processes_survives_kills(folder):
    """A kill in the first stage, a signal in the second: the same bits as without."""
    (folder / "two.toml").write_text(STAGES)
    fields = [*FIELDS, "--config", "two.toml"]

    def begin(run):
        return start(folder, run, 2, command="orchestrator", fields=fields)

    for status, error in finish(begin("whole")):
        assert status == 0, error
    rng = random.Random(os.environ.get("SLM_JAX_TEST_SEED", "0"))
    first, second = "killed/stages/01-first", "killed/stages/02-second"
    started = begin("killed")
    wait_for_step(folder, first, rng.randrange(1, 14), started)
    started[rng.randrange(2)].kill()
    assert all(status != 0 for status, _ in finish(started))
    started = begin("killed")
    wait_for_step(folder, second, rng.randrange(1, 6), started)
    started[rng.randrange(2)].send_signal(signal.SIGTERM)
    assert {status for status, _ in finish(started)} <= {0, 143}  # 0: it had come too late
    for status, error in finish(begin("killed")):
        assert status == 0, error
    for stage in ("01-first", "02-second"):
        assert rows(folder, f"killed/stages/{stage}") == rows(folder, f"whole/stages/{stage}")
    pairs = zip(parameters(folder, "killed"), parameters(folder, "whole"), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_parts_of_the_verification_are_all_files_once(tmp_path):
    """Every flipped bit is found by exactly one of the processes, every missing or short file by all."""
    rng = np.random.default_rng(0)
    for i, size in enumerate((1, 10, 5_000, 4_000, 900, 7, 3_000)):
        (tmp_path / "state" / str(i)).parent.mkdir(exist_ok=True)
        (tmp_path / "state" / str(i)).write_bytes(rng.bytes(size))
    checkpoint = epath.Path(tmp_path)
    checksums.write(checkpoint)

    def finders(count):
        found = []
        for index in range(count):
            try:
                assert checksums.verify(checkpoint, (index, count))
            except checksums.DamagedError:
                found.append(index)
        return found

    for count in (1, 2, 3, 9):
        assert finders(count) == []
        for path in sorted((tmp_path / "state").iterdir()):
            original = path.read_bytes()
            path.write_bytes(bytes([original[0] ^ 4]) + original[1:])
            assert len(finders(count)) == 1
            path.write_bytes(original[:-1])
            assert finders(count) == list(range(count))
            path.unlink()
            assert finders(count) == list(range(count))
            path.write_bytes(original)
    table = json.loads((tmp_path / "checksums.json").read_text())
    shares = [sum(table[name][0] for name in checksums._part(table, index, 2)) for index in range(2)]
    assert max(shares) <= 0.6 * sum(shares)
