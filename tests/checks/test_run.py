"""Checks of a trained run, each of which can fail, and the command."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from slm_jax.checks import FAIL, OK, SKIPPED, as_table, trained
from slm_jax.checks.run import check
from slm_jax.cli.check import main
from slm_jax.model import ops
from slm_jax.run.directory import Run
from slm_jax.run.load import load_run
from slm_jax.run.metrics import read_metrics
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError
from tests.helpers import tiny_config

# A trained run.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a small run for forty steps, validated at the last one."""
    folder = tmp_path_factory.mktemp("check")
    lines = (f"Line {i}: the quick brown fox jumps over {i * 7 % 13} lazy dogs.\n" for i in range(600))
    (folder / "text.txt").write_text("".join(lines))
    config = tiny_config(
        data__files=str(folder / "text.txt"), data__cache=str(folder / "cache"), tokenizer__vocab_size=400,
        train__steps=40, eval__every=40, eval__sample_tokens=0, checkpoint__every=20, mesh__data=1, model__depth=1,
        optimizer__name="adamw",
    )  # fmt: skip
    train(config, folder / "run")
    return Run(folder / "run")


@pytest.fixture(scope="module")
def loaded(run):
    return load_run(str(run.path))


@pytest.fixture(scope="module")
def rows_and_corpus(loaded):
    from slm_jax.data.corpus.corpus import open_corpus

    corpus = open_corpus(loaded.run.corpus, loaded.tokenizer)
    return trained.row_losses(loaded.model, loaded.config, [corpus.validation]), corpus


def test_loss_of_a_run_matches_its_log_and_is_below_the_baselines(run, loaded, rows_and_corpus):
    rows, corpus = rows_and_corpus
    loss = trained.held_out_loss(rows)
    size = loaded.tokenizer.vocab_size
    assert sum(row.tokens for row in rows) == len(corpus.validation)
    assert loss == pytest.approx(read_metrics(run.metrics)[-1]["val_loss"], rel=1e-6)
    assert trained.matches_log(loss, read_metrics(run.metrics), 40, "float32").verdict == OK
    assert trained.matches_log(loss + 1e-3, read_metrics(run.metrics), 40, "float32").verdict == FAIL
    assert trained.matches_log(loss, read_metrics(run.metrics), 39, "float32").verdict == SKIPPED
    unigram = trained.unigram_loss(corpus.train, rows, size)
    assert trained.below_baselines(loss, unigram, size).verdict == OK
    assert trained.below_baselines(unigram + 0.01, unigram, size).verdict == FAIL
    assert trained.below_baselines(float("nan"), unigram, size).verdict == FAIL


def test_baseline_is_the_cross_entropy_of_token_frequencies():
    tokens = np.repeat(np.arange(4), [50, 25, 15, 10]).astype(np.uint16)
    row = trained.RowLoss(0.0, len(tokens), tokens.astype(np.int32))
    p = (np.array([50, 25, 15, 10]) + 1) / 104
    expected = -(np.array([50, 25, 15, 10]) / 100 * np.log(p)).sum()
    assert trained.unigram_loss(tokens, [row], 4) == pytest.approx(expected)


def test_texts_with_the_highest_loss_are_shown(loaded, rows_and_corpus):
    rows, _ = rows_and_corpus
    found = trained.per_sample(rows, loaded.tokenizer, 2)
    assert found.verdict == OK
    worst = sorted((row.mean for row in rows), reverse=True)[:2]
    assert [float(line.split()[0]) for line in found.details] == pytest.approx(worst, abs=1e-3)
    broken = [*rows, rows[0]._replace(nll=float("nan"))]
    assert trained.per_sample(broken, loaded.tokenizer).verdict == FAIL


def test_broken_cache_fails(loaded, monkeypatch):
    ids = loaded.tokenizer.encode("Line 5: the quick brown fox", mode="flat")[:16]
    assert trained.cached_logits(loaded.model, ids, loaded.context).verdict == OK
    right = ops.cache_mask

    def forgets(positions, cached, window=0):  # the token before
        return right(positions, cached, window) & (positions[:, :, None] - cached[:, None, :] != 1)

    monkeypatch.setattr(ops, "cache_mask", forgets)
    assert trained.cached_logits(loaded.model, ids, loaded.context).verdict == FAIL


def test_greedy_text_of_another_model_fails(loaded, monkeypatch):
    prompt = loaded.tokenizer.encode("Line 5: the", mode="flat")
    arguments = (loaded.model, loaded.tokenizer, prompt, loaded.context, 8)
    monkeypatch.setattr(trained, "generate_ids", lambda *_: [[10] * 8])
    assert trained.greedy_text(*arguments).verdict == FAIL


def test_metrics_without_each_step_once_fail(run):
    rows = read_metrics(run.metrics)
    assert trained.metrics_rows(rows, 40).verdict == OK
    for wrong in (rows[:-1], [*rows[:5], rows[4], *rows[5:]], rows[1:], [rows[1], rows[0], *rows[2:]]):
        assert trained.metrics_rows(wrong, 40).verdict == FAIL
    assert trained.metrics_rows([{**rows[0], "loss": float("inf")}, *rows[1:]], 40).verdict == FAIL


# The command.


@pytest.fixture(autouse=True)
def _untuned(monkeypatch):
    """Keep the memory settings of the test process, and compiled programs out of the user's cache."""
    monkeypatch.setattr("slm_jax.utils.process.tune_process", lambda: None)


def test_command_checks_a_trained_run(run, capsys):
    assert main(["--run", str(run.path), "--format", "json", "--worst", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    names = {each["name"]: each["verdict"] for each in report["checks"]}
    assert {"labels", "finite weights", "causality", "held-out loss", "cached logits", "greedy text"} <= names.keys()
    assert set(names.values()) == {OK, SKIPPED}  # there is no window


@pytest.mark.slow
def test_corrupt_checkpoint_and_lost_row_are_reported(run, tmp_path, capsys):
    broken = Run(tmp_path / "run")
    shutil.copytree(run.path, broken.path)
    for file in (broken.checkpoints / "40").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"")
    broken.metrics.write_text("".join(broken.metrics.read_text().splitlines(keepends=True)[1:]))
    found = {each.name: each for each in check(run=broken.path)}
    assert found["checkpoint"].verdict == FAIL
    assert "1 of 2 (20, 40)" in found["checkpoint"].found
    assert found["metrics"].verdict == FAIL
    assert found["held-out loss"].verdict == OK
    assert "2 of" in as_table(list(found.values())).splitlines()[-1]
    broken.metrics.write_text('{"a": 1}\n')
    found = {each.name: each for each in check(run=broken.path)}
    assert found["metrics"].found.startswith("0 rows")
    assert found["validation repeats"].verdict == SKIPPED


@pytest.mark.slow
def test_command_checks_a_config_before_training(run, tmp_path, capsys):
    config = run.read_config()
    path = tmp_path / "mine.toml"
    path.write_text(config.to_toml())
    assert main(["--config", str(path), "--model.window", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "verdict", "found", "expected"]
    at = lines[0].index("verdict")
    verdicts = {line[:at].strip(): line[at:].split()[0] for line in lines[1:-2]}
    assert {"memory", "one step", "initial loss", "attention window"} <= verdicts.keys()
    assert set(verdicts.values()) == {OK}
    assert lines[-1].startswith("all ")
    assert not list(tmp_path.glob("runs"))


def test_unusable_text_is_reported(run, tmp_path):
    config = run.read_config()
    (tmp_path / "short.txt").write_text("too short")
    data = config.data.model_copy(update={"files": (str(tmp_path / "short.txt"),)})
    (found,) = check(config=config.model_copy(update={"data": data}))
    assert found.verdict == FAIL
    assert "short" in found.found or "one batch takes" in found.found


def test_invalid_usage_of_the_command():
    with pytest.raises(UserError, match="no run in nowhere"):
        main(["--run", "nowhere"])
    with pytest.raises(UserError, match="--format xml"):
        main(["--format", "xml"])
    with pytest.raises(UserError, match="--worst many"):
        main(["--worst", "many"])
    wrong = [sys.executable, "-m", "slm_jax.check", "--model.dims", "3"]
    ended = subprocess.run(wrong, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert (
        ended.stderr.strip()
        == "error: unknown option --model.dims, perhaps you meant --model.dim (--help all lists every option)"
    )
