"""Runs under adverse conditions: spikes, NaN, lost files, signals; and diagnostics on request."""

import gzip
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from slm_jax.run import checksums
from slm_jax.run.checkpoint import Checkpoints
from slm_jax.run.directory import Run
from slm_jax.run.load import load_run
from slm_jax.run.metrics import MetricsWriter, read_metrics, scores_text
from slm_jax.run.selection import list_checkpoints
from slm_jax.training import recorder
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError
from tests.helpers import tiny_config

SMALL = {
    "model__depth": 1,
    "optimizer__name": "adamw",
    "optimizer__schedule": "constant",
    "train__batch_size": 4,
    "tokenizer__vocab_size": 300,
    "data__validation_fraction": 0.2,
    "eval__sample_tokens": 0,
    "eval__every": 6,
    "mesh__data": 1,
}


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory):
    """The text of the runs of this module, with a cache of its own."""
    folder = tmp_path_factory.mktemp("text")
    lines = (f"Line {i}: the quick brown fox jumps over {i * 7 % 13} lazy dogs." for i in range(200))
    (folder / "text.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield str(folder / "text.txt")


@pytest.fixture
def start(text, tmp_path, caplog):
    caplog.set_level("INFO", "slm_jax")

    def run(name="run", steps=12, **fields):
        config = tiny_config(**SMALL | {"train__steps": steps, "data__files": (text,), **fields})
        return train(config, tmp_path / name)

    return run


def weights(path):
    """Return the embedding of the newest checkpoint."""
    return [np.asarray(x) for x in jax.tree.leaves(load_run(path).model.embedding[...])]


@pytest.mark.slow
def test_a_spike_stops_the_run_and_another_policy_resumes_it(start, tmp_path, text):
    """Train on many similar lines with some of random characters among them."""
    rng = random.Random(0)
    noise = ["".join(chr(rng.randrange(33, 1000)) for _ in range(30)) for _ in range(8)]
    text = Path(text).read_text().split("\n")
    (tmp_path / "noisy.txt").write_text("\n<|endoftext|>\n".join(["\n".join(text * 2), *noise]))
    watch = {"health__deviations": 2.0, "health__warmup_steps": 8, "checkpoint__every": 4, "steps": 40}
    watch |= {"data__files": (str(tmp_path / "noisy.txt"),), "train__sequence_length": 32, "train__batch_size": 2}
    with pytest.raises(UserError, match=r"of step \d+ is .*2 deviations over its running mean") as stopped:
        start(health__on_spike="stop", **watch)
    step = int(str(stopped.value).partition("of step ")[2].split()[0])
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, step))
    assert Run(tmp_path / "run").newest_step() == (step - 1) // 4 * 4
    result = start(health__on_spike="skip", **watch)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[step - 1].get("skipped", 0) in (0, 1)  # 1, unless statistics restarted at the last checkpoint
    assert result.metrics["skipped"] >= 1
    start(health__on_spike="ignore", **watch | {"steps": 41})  # a state without statistics again
    assert "skipped" not in read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]


def test_a_run_that_stays_non_finite_stops_after_max_skips(start, tmp_path):
    """The updates are so large that the weights overflow from the second step on."""
    with pytest.raises(UserError, match="3 batches in a row were skipped, the last one at step 4"):
        start(optimizer__lr=1e30, optimizer__warmup_steps=0, health__on_nan="skip", health__max_skips=3)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["grad_norm"] is None for row in rows] == [False, True, True]
    assert [row["skipped"] for row in rows] == [0, 1, 2]
    assert Run(tmp_path / "run").newest_step() is None


def test_a_diverged_model_still_ends_with_its_training_curve(start, tmp_path):
    overflow = {"optimizer__lr": 3e38, "optimizer__weight_decay": 100.0, "optimizer__warmup_steps": 0}
    result = start(steps=4, health__on_nan="skip", health__max_skips=9, checkpoint__keep_best=1, **overflow)
    assert result.metrics["val_loss"] is None
    assert Run(result.run).plot.is_file()
    assert scores_text(result.metrics) == "no finite numbers"


def test_lost_files_are_reported_and_a_refusal_changes_nothing(start, tmp_path, caplog):
    start(steps=4, checkpoint__every=2, eval__every=2, eval__sample_tokens=4)
    run = Run(tmp_path / "run")
    shutil.rmtree(run.corpus)
    for _ in range(2):
        with pytest.raises(UserError, match=r"optimizer\.lr: 0\.0\d+ saved, 0\.1 current"):
            start(steps=5, optimizer__lr=0.1, eval__sample_tokens=4)
    with run.samples.open("ab") as file:  # cut short by a full disk
        file.write(b"\n## Step \n## Step 5\n    caf\xc3")
    whole = run.metrics.read_text()
    run.metrics.write_text(whole.partition("\n")[0] + "\n")
    caplog.clear()
    start(steps=5, eval__sample_tokens=4)
    assert "metrics.jsonl does not hold every step up to 4" in caplog.text
    assert "caf" not in run.samples.read_text()
    shutil.rmtree(run.checkpoints)
    start(steps=5, eval__sample_tokens=4)
    assert "there is no checkpoint: starting again; 2 steps in metrics.jsonl will be repeated" in caplog.text
    kept = [{k: row[k] for k in ("step", "loss", "grad_norm")} for row in read_metrics(run.metrics)[:4]]
    assert kept == [{k: row[k] for k in ("step", "loss", "grad_norm")} for row in map(json.loads, whole.splitlines())]


def test_a_first_signal_does_not_interrupt_the_last_checkpoint(start, monkeypatch):
    def write_slowly(folder, write=checksums.write):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        write(folder)

    monkeypatch.setattr(checksums, "write", write_slowly)
    result = start(steps=2)
    assert (result.step, result.stopped_by, result.signal) == (2, None, signal.SIGTERM)
    assert Run(result.run).newest_step() == 2


def test_a_checkpoint_of_a_signal_has_its_score_and_its_rows_on_disk(start, monkeypatch):
    """Without `keep_best` no validation saves a checkpoint: the one of the signal is the only one."""
    events = []

    def append_and_stop(path, step, texts, append=recorder.append_samples):
        append(path, step, texts)
        os.kill(os.getpid(), signal.SIGTERM)

    def flush(self, flush=MetricsWriter.flush):
        flush(self)
        events.append(len(read_metrics(Path(self._file.name))))

    def save(self, step, *args, save=Checkpoints.save):
        events.append(f"saved {step}")
        save(self, step, *args)

    monkeypatch.setattr(recorder, "append_samples", append_and_stop)
    monkeypatch.setattr(MetricsWriter, "flush", flush)
    monkeypatch.setattr(Checkpoints, "save", save)
    fields = {"checkpoint__every": 9, "checkpoint__keep_best": 0, "eval__every": 2, "eval__sample_tokens": 2}
    result = start(steps=9, **fields)
    assert (result.step, result.stopped_by) == (2, signal.SIGTERM)
    assert events == [2, "saved 2"]
    (checkpoint,) = list_checkpoints(Run(result.run))
    assert checkpoint.bits_per_byte == result.metrics["val_bits_per_byte"]
    assert checkpoint.loss == result.metrics["val_loss"]


def test_checkpoint_folder_is_absolute_and_locked(start, tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    start(steps=2, checkpoint__folder="states")
    start(steps=3, checkpoint__folder=str(tmp_path / "a" / "states"))
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(UserError, match=r"checkpoint\.folder: '.*a/states' saved, '.*b/states' current"):
        start(steps=4, checkpoint__folder="states")
    with (
        Run(tmp_path / "another").lock(str(tmp_path / "a" / "states")),
        pytest.raises(UserError, match=r"another process is saving its checkpoints in .*states: wait for it"),
    ):
        start(steps=4, checkpoint__folder="../a/states")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"is a file, not a folder: use another --checkpoint\.folder"):
        start("new", steps=4, checkpoint__folder=str(tmp_path / "file"))


@pytest.mark.slow
def test_debug_reports_the_step_and_operation_of_a_nan(start):
    with pytest.raises(UserError, match=r"step 2: invalid value \(nan\) encountered in \w+.* \(\w+\.py:\d+\)"):
        start(optimizer__lr=1e30, optimizer__warmup_steps=0, train__debug=True)
    assert not jax.config.jax_debug_nans


def test_traces_and_norms_on_request(start, tmp_path, caplog):
    start(steps=6, log__profile="3:4", log__layers=2)
    (trace,) = (tmp_path / "run" / "profile").glob("**/perfetto_trace.json.gz")
    assert f"a trace of steps up to 4 is in {trace.parent}" in caplog.text
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name", "").startswith("train")}
    assert steps == {"3", "4"}
    rows = read_metrics(tmp_path / "run" / "layers.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert set(rows[0]) == {"step", "grad_norm", "param_norm", "update_ratio"}
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    second, third = np.diff([row["seconds"] for row in rows])[:2]
    speeds = [row["tokens"] / row["tokens_per_second"] for row in rows]
    np.testing.assert_allclose(speeds[1:3], [second, (second + third) / 2])  # without the slow first


@pytest.mark.slow
def test_checkpoints_elsewhere_outlive_the_run_directory(start, tmp_path):
    """A new machine without the run directory resumes from the folder of checkpoints."""
    folder = str(tmp_path / "elsewhere")
    start("whole", steps=9)
    start("lost", steps=6, checkpoint__folder=folder)
    assert not (tmp_path / "lost" / "checkpoints").exists()
    start("found", steps=9, checkpoint__folder=folder)
    assert [row["step"] for row in read_metrics(tmp_path / "found" / "metrics.jsonl")] == [7, 8, 9]
    for first, second in zip(weights(tmp_path / "whole"), weights(tmp_path / "found"), strict=True):
        assert np.array_equal(first, second)
    with pytest.raises(UserError, match=r"step 9 has another config: model\.mlp_dim is 96 saved, 64 current"):
        start("other", steps=12, checkpoint__folder=folder, model__mlp_dim=64)
    with pytest.raises(UserError, match="step 9 was saved with another tokenizer"):
        start("words", steps=12, checkpoint__folder=folder, tokenizer__vocab_size=320)


def test_load_run_averages_checkpoints(start, tmp_path):
    start(steps=4, checkpoint__every=2)
    newest, mean = load_run(tmp_path / "run"), load_run(tmp_path / "run", average=2)
    assert newest.step == mean.step == 4
    assert not np.array_equal(newest.model.embedding[...], mean.model.embedding[...])
    with pytest.raises(UserError, match="not 3 to average"):
        load_run(tmp_path / "run", average=3)


def test_a_run_that_was_refused_can_be_started_again_with_other_options(start, tmp_path):
    """Only the options of the text bind a run before its first checkpoint; all do afterwards."""
    with pytest.raises(UserError, match=r"use a smaller --model\.dim or --model\.depth"):
        start(steps=2, train__memory_gb=1e-6)
    run = Run(tmp_path / "run")
    assert run.corpus.is_dir()
    assert run.newest_step() is None
    with pytest.raises(UserError, match=r"One option differs:\n  tokenizer\.vocab_size: 300 saved, 310 current"):
        start(steps=2, tokenizer__vocab_size=310, model__depth=2)
    start(steps=2, model__remat="full", model__mlp_dim=64, train__sequence_length=8, optimizer__lr=0.02)
    assert run.read_config().model.mlp_dim == 64
    assert run.newest_step() == 2
    with pytest.raises(UserError, match=r"One option differs:\n  model\.mlp_dim: 64 saved, 96 current"):
        start(steps=3, model__remat="full", train__sequence_length=8, optimizer__lr=0.02)


@pytest.mark.parametrize(
    "change",
    [
        {"model__attention": "naive"},
        pytest.param({"model__scan_layers": True}, marks=pytest.mark.slow),
        pytest.param({"model__remat": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_execution_options_may_change_on_resume(start, tmp_path, change, caplog):
    """The checkpoint is restored, and the losses agree with those of an unchanged run up to rounding."""
    fields = {"model__depth": 2, "model__dropout": 0.1, "train__dtype": "float32"}
    start("whole", steps=6, **fields)
    start("changed", steps=3, **fields)
    caplog.clear()
    start("changed", steps=6, **fields, **change)
    assert "continuing after step 3" in caplog.text
    whole, changed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "changed"))
    assert [row["step"] for row in changed] == list(range(1, 7))
    np.testing.assert_allclose([row["loss"] for row in changed], [row["loss"] for row in whole], rtol=1e-5)
    name = next(iter(change)).replace("__", ".")
    assert Run(tmp_path / "changed").read_config().flat()[name] == next(iter(change.values()))


def test_train_writes_the_curve_and_the_report(start, tmp_path):
    start(steps=2)
    run = Run(tmp_path / "run")
    assert run.plot.read_bytes().startswith(b"\x89PNG")
    assert "<html" in run.report.read_text()
    run.report.unlink()
    run.plot.unlink()
    start(steps=2)  # finished, and killed before the report was written
    assert run.plot.is_file()
    assert run.report.is_file()
