"""Test runs of several processes, connected on the loopback interface."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from slm_jax.cli.options import MultihostOptions, read_options
from slm_jax.cli.train import parse_args
from slm_jax.distributed import agreement, lifecycle, multihost
from slm_jax.run.directory import Run
from slm_jax.run.metrics import read_metrics
from slm_jax.run.samples import read_samples
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError
from tests.processes import Process, command_environment
from tests.runs import without_clock

FIELDS = (
    "--model.dim 32 --model.heads 4 --model.mlp_dim 96 --model.depth 2 --model.vocab_multiple 2 --train.batch_size 8 "
    "--train.sequence_length 32 --tokenizer.vocab_size 400 --optimizer.warmup_steps 2 --eval.sample_tokens 8 "
    "--eval.max_tokens 500 --train.dtype float32 --data.files text.txt --eval.every 5 --checkpoint.every 5"
).split()


def start(folder, run, processes, devices, *more, own=None):
    """Start the processes of one run, with `devices` each; `own` are options of each process alone."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = command_environment(folder / "cache", devices)
    started = []
    for i in range(processes):
        together = ["--coordinator", address, "--processes", processes, "--process", i] if processes > 1 else []
        command = [
            sys.executable,
            "-m",
            "slm_jax.train",
            "--run",
            run,
            *FIELDS,
            *together,
            *more,
            *(own[i] if own else []),
        ]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(Process(list(map(str, command)), cwd=folder, env=environment, **pipes))
    return started


def finish(started, timeout=240):
    """Return (exit status, standard error) of each process."""
    errors = [each.communicate(timeout=timeout)[1] for each in started]
    return [(each.returncode, error) for each, error in zip(started, errors, strict=True)]


def rows(folder, run):
    return without_clock(read_metrics(Run(folder / run).metrics))


def assert_close(some, others):
    """Assert equality up to the order of reduction over devices."""
    assert [row["step"] for row in some] == [row["step"] for row in others] == list(range(1, len(some) + 1))
    for a, b in zip(some, others, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=1e-4)


def wait_for_step(folder, run, step, started):
    end = time.monotonic() + 120
    while True:
        records = read_metrics(Run(folder / run).metrics)
        if records and records[-1]["step"] >= step:
            return
        assert time.monotonic() < end, "no progress"
        assert all(each.poll() is None for each in started), finish(started)
        time.sleep(0.05)


def test_run_of_two_processes_resumes_on_one(folder, monkeypatch):
    """2 processes x 2 devices, FSDP x tensor, then one device, give the metrics of one device throughout."""
    (folder / "words.txt").write_text("fox quick dogs lazy\nLine fox jumps dogs\n")
    pairs = ({"sentence_good": f"The quick fox {i} jumps.", "sentence_bad": f"Quick the {i}"} for i in range(8))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    # The schedule does not depend on the number of steps. Tasks are scored with parameters split over the processes.
    constant = ("--optimizer.schedule", "constant", "--eval.tasks", "blimp=pairs.jsonl", "analogies=words.txt")
    mesh = ("--mesh.fsdp", 2, "--mesh.tensor", 2)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    started = start(folder, "two", 2, 2, *mesh, *constant, "--train.steps", 5)
    for status, error in finish(started):
        assert status == 0, error
    for run in ("two", "one"):  # in the process of the tests
        options = ("--mesh.data", 1, "--mesh.fsdp", 1, "--mesh.tensor", 1, *constant, "--train.steps", 8)
        train(parse_args([*FIELDS, "--run", run, *map(str, options)])[0], folder / run)
    assert_close(rows(folder, "two"), rows(folder, "one"))
    assert {"task_blimp", "task_analogies"} <= rows(folder, "two")[4].keys()
    # Generated with parameters split over both processes, and by one device.
    split, alone = (read_samples(Run(folder / run).samples) for run in ("two", "one"))
    assert split == alone
    assert any(sample.step == 5 for sample in split)


@pytest.mark.slow
def test_two_processes_take_the_steps_that_the_first_one_chooses(folder):
    for status, error in finish(start(folder, "timed", 2, 1, "--train.minutes", 1, "--eval.every", 100)):
        assert status == 0, error
    steps = json.loads((folder / "timed" / "trial.json").read_text())["steps"]
    for status, error in finish(start(folder, "given", 2, 1, "--train.steps", steps, "--eval.every", 100)):
        assert status == 0, error
    assert len(rows(folder, "timed")) == steps
    assert rows(folder, "timed") == rows(folder, "given")


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_after_the_same_step(folder):
    started = start(folder, "run", 2, 2, "--train.steps", 3000, "--mesh.fsdp", 4)
    wait_for_step(folder, "run", 3, started)
    started[1].send_signal(signal.SIGTERM)
    (first, error), (second, _) = finish(started)
    assert (first, second) == (143, 143), error
    step = rows(folder, "run")[-1]["step"]
    assert (Run(folder / "run").checkpoints / str(step)).is_dir()
    status, error = finish(start(folder, "run", 1, 8, "--mesh.fsdp", 2, "--train.steps", step + 4))[0]
    assert status == 0, error
    assert f"continuing after step {step}" in error


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_lost_process_ends_the_others_with_a_message_within_a_minute(folder, lost):
    started = start(folder, "run", 2, 2, "--train.steps", 3000)
    wait_for_step(folder, "run", 7, started)
    started[lost].kill()
    begin = time.monotonic()
    status, error = finish(started, timeout=60)[1 - lost]
    assert time.monotonic() - begin < 60
    assert status in (lifecycle.PROCESS_LOST, -signal.SIGABRT)
    assert "another process of this run has ended or cannot be reached" in error
    steps = rows(folder, "run")[-1]["step"] + 3
    for status, error in finish(start(folder, "run", 2, 2, "--train.steps", steps)):
        assert status == 0, error
    assert [row["step"] for row in rows(folder, "run")] == list(range(1, steps + 1))


JOIN = """
import os, signal, sys
from slm_jax.distributed import agreement, lifecycle, multihost
lifecycle._JOIN_TIMEOUT = 10
if sys.argv[3] == "before":
    os.kill(os.getpid(), signal.SIGKILL)
lifecycle.initialize(sys.argv[1], 2, int(sys.argv[2]))
if sys.argv[3] == "after":
    os.kill(os.getpid(), signal.SIGKILL)
agreement.from_first("x", lambda: 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("before", "not all processes of this run have joined in time"),
        ("after", "another process of this run has ended or cannot be reached"),
    ],
)
@pytest.mark.parametrize("lost", [0, 1])
def test_process_lost_while_joining_ends_the_others_with_a_message(lost, when, message):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = [
        Process([sys.executable, "-c", JOIN, address, str(i), when if i == lost else "never"], **pipes)
        for i in range(2)
    ]
    status, error = finish(started, timeout=60)[1 - lost]
    assert status in (lifecycle.PROCESS_LOST, -signal.SIGABRT), error
    assert message in error


PRINT_PROCESS = """
from slm_jax.distributed import agreement, lifecycle, multihost
lifecycle.initialize()
import jax
devices = jax.config.values["jax_cuda_visible_devices"]
print(multihost.process_count(), multihost.is_first(), agreement.from_first("test", lambda: "agreed"), devices)
assert (jax.process_count(), jax.process_index()) == multihost.part()[::-1]
"""


def slurm(process, nodes):
    return {
        "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2,
        "SLURM_STEP_NUM_NODES": nodes, "SLURM_PROCID": process, "SLURM_LOCALID": process // nodes,
    }  # fmt: skip


def open_mpi(process, nodes):
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": 2,
        "OMPI_COMM_WORLD_RANK": process, "OMPI_COMM_WORLD_LOCAL_RANK": process // nodes,
        "OMPI_COMM_WORLD_LOCAL_SIZE": 2 // nodes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cluster", "nodes"),
    [
        pytest.param(slurm, 1, marks=pytest.mark.slow),
        (slurm, 2),
        (open_mpi, 1),
        pytest.param(open_mpi, 2, marks=pytest.mark.slow),
    ],
)
def test_processes_of_a_cluster_connect_and_find_their_devices(cluster, nodes):
    """Slurm and Open MPI describe the cluster in the environment; alone on a node, a process has all of its GPUs."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        own = {"JAX_COORDINATOR_PORT": free.getsockname()[1], "JAX_PLATFORMS": "cpu"}
    started = []
    for i in range(2):
        environment = os.environ | {name: str(value) for name, value in (own | cluster(i, nodes)).items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(Process([sys.executable, "-c", PRINT_PROCESS], env=environment, **pipes))
    outputs = [each.communicate(timeout=120) for each in started]
    devices = ("all", "all") if nodes == 2 else ("0", "1")
    lines = [out.splitlines()[-1].split() for out, _ in outputs]  # Gloo writes to stdout too
    assert lines == [["2", str(i == 0), "agreed", devices[i]] for i in range(2)], outputs


def test_invalid_option_is_reported_by_every_process(folder):
    for status, error in finish(start(folder, "run", 2, 1, "--train.batch_size", 7)):
        assert status == 2
        assert "7 is not divisible by 2 devices: use 6 or 8" in error


def test_different_options_are_reported_by_every_process(folder):
    started = start(folder, "run", 2, 1, "--train.steps", 4, own=[[], ["--optimizer.lr", 0.5]])
    (first, error), (second, other_error) = finish(started)
    assert (first, second) == (2, 2)
    message = "error: the options of process 1 differ: optimizer.lr is not given in process 0, 0.5 in process 1"
    assert f"\n{message}" in error
    assert f"\nprocess 1: {message}" in other_error
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--process", "1"], "belong together"),
        (["--processes", "two"], "--processes two: should be a whole number"),
        (["--processes", "²"], "--processes ²: should be a whole number"),
        ("--coordinator here --processes 2 --process 0".split(), "--coordinator here: should be HOST:PORT"),
    ],
)
def test_invalid_multihost_options_are_rejected(args, message):
    with pytest.raises(UserError, match=re.escape(message)):
        lifecycle.initialize(**vars(read_options(MultihostOptions, args, "x")))


def test_single_process_connects_to_nothing():
    lifecycle.initialize(**vars(read_options(MultihostOptions, ["--processes", "1"], "x")))
    assert multihost.process_count() == 1
    assert agreement.from_first("x", lambda: 7) == agreement.minimum("x", 7) == 7
