"""TensorBoard, Weights & Biases and trackio receive each step once, also after a kill."""

import importlib
import json
import sqlite3
import struct
import subprocess
import sys

import pytest

from slm_jax.run.directory import Run
from slm_jax.run.metrics import MetricsWriter, read_metrics
from slm_jax.training.options.loggers import make_loggers
from slm_jax.utils.errors import UserError
from tests.helpers import tiny_config


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run_folder = Run(tmp_path / "run")
    run_folder.path.mkdir()
    return run_folder


def row(step, **more):
    return {"step": step, "loss": 10.0 / step, "time": 1e9 + step, **more}


def write(run, name, after, upto, killed=False):
    """Imitate a call of training that resumes after a checkpoint, writes rows, and ends regularly or is killed."""
    config = tiny_config(log__sinks=(name,))
    metrics = MetricsWriter(run.metrics, after, True, make_loggers(config, run, after))
    for step in range(after + 1, upto + 1):
        metrics.write(row(step, **({"val_loss": 3.0} if step == 4 else {})))
        if step == 4:
            metrics.flush()  # a checkpoint
    if not killed:
        metrics.close()
    return metrics


def test_tensorboard_after_a_kill(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    killed = write(run, "tensorboard", 0, 6, killed=True)
    write(run, "tensorboard", 4, 7)
    read = accumulator.EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    losses = read.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 8))
    assert all(event.value == pytest.approx(10 / event.step) for event in losses)
    assert all(event.wall_time == 1e9 + event.step for event in losses)
    assert [event.step for event in read.Scalars("val_loss")] == [4]
    del killed  # until now: to end in order is not what a killed one does


def write_in_a_process(run, name, after, upto, killed):
    """Call `write` in a process of its own."""
    script = (
        "import os, pathlib, sys\nfrom slm_jax.run.directory import Run\n"
        "from tests.training.test_loggers import write\n"
        "path, name, after, upto, killed = sys.argv[1:]\n"
        "metrics = write(Run(pathlib.Path(path)), name, int(after), int(upto), killed == 'True')\n"
        "if killed == 'True': os._exit(9)\n"
    )
    command = [sys.executable, "-c", script, str(run.path), name, str(after), str(upto), str(killed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == (9 if killed else 0), done.stderr
    assert "receives no more rows" not in done.stderr


def test_trackio_after_a_kill(run):
    trackio = pytest.importorskip("trackio")
    write_in_a_process(run, "trackio", 0, 6, killed=True)
    write_in_a_process(run, "trackio", 4, 7, killed=False)
    database = next((run.path.parent / "trackio").glob("slm_jax*.db"))
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    assert [step for step, _ in rows] == list(range(1, 8)), trackio.__version__
    assert [json.loads(metrics)["loss"] for _, metrics in rows] == [10.0 / step for step in range(1, 8)]


def test_wandb_offline_after_a_kill(run):
    pytest.importorskip("wandb")
    write_in_a_process(run, "wandb", 0, 5, killed=True)
    write_in_a_process(run, "wandb", 4, 7, killed=False)
    folders = sorted((run.path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.partition("-run-")[2].partition("-")[2] for folder in folders}) == 1  # one run for both
    found = read_wandb(next(folders[1].glob("*.wandb")))
    assert found == [(step, 10 / step) for step in range(1, 8)]  # whatever came of what the first one sent


def read_wandb(path):
    """Return [(step, loss)] of the file of an offline run."""
    wandb_internal_pb2 = importlib.import_module("wandb.proto.wandb_internal_pb2")
    rows = []
    for data in leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            rows.append((record.history.step.num or values.get("_step"), values["loss"]))
    return rows


def leveldb_records(data):
    """The records of a LevelDB log with a header of 7 bytes: blocks of 32 KiB with parts of (CRC-32C, length, type)."""
    at = 7
    parts = b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # too little room for another part
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_a_missing_library_is_reported(run, monkeypatch):
    for name in ("tensorboard", "wandb", "trackio"):
        for module in [name, *(m for m in sys.modules if m.startswith(f"{name}."))]:
            monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(UserError, match=rf"--log.sinks needs {name}.*pip install -e '\.\[logging\]'"):
            make_loggers(tiny_config(log__sinks=(name,)), run, 0)


def test_a_failing_logger_is_removed_with_a_warning(run, caplog):
    class Broken:
        def log(self, row):
            raise OSError("the server is gone")

        def close(self):
            raise AssertionError("it should have been removed")

    with MetricsWriter(run.metrics, 0, True, [Broken()]) as metrics:
        metrics.write(row(1))
        metrics.write(row(2))
    assert [r["step"] for r in read_metrics(run.metrics)] == [1, 2]
    assert caplog.text.count("Broken failed and receives no more rows (the server is gone)") == 1
