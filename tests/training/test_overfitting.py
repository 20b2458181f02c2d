"""A text that is memorized: the rise is reported, the best checkpoint kept and used, and the run ended on request."""

import logging
import random
import shutil
from typing import NamedTuple

import numpy as np
import pytest

from slm_jax.checks import FAIL, OK, trained
from slm_jax.cli import export as export_command
from slm_jax.cli import generate as generate_command
from slm_jax.cli import train as command
from slm_jax.config.schema import Config
from slm_jax.run.directory import Run
from slm_jax.run.load import load_run
from slm_jax.run.metrics import MetricsWriter, read_metrics
from slm_jax.run.selection import list_checkpoints
from slm_jax.run.trend import Trend
from slm_jax.training.overfitting import rise_text
from slm_jax.training.result import Result
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError
from tests.helpers import tiny_config

EVERY = 5


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of random words, from which next to nothing can be learned."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijkl") for _ in range(4)) for _ in range(200)]
    file = tmp_path_factory.mktemp("noise") / "noise.txt"
    file.write_text("\n<|endoftext|>\n".join(" ".join(rng.choices(words, k=8)) for _ in range(24)))
    return str(file)


def config_of(text, **fields):
    """Return the config of a run that overfits within 40 steps."""
    return tiny_config(
        **{
            "data__files": (text,),
            "data__validation_fraction": 0.3,
            "model__depth": 1,
            "tokenizer__vocab_size": 300,
            "optimizer__schedule": "constant",
            "optimizer__lr": 0.03,
            "train__steps": 40,
            "eval__every": EVERY,
            "eval__sample_tokens": 2,
            "checkpoint__every": 8,
            "checkpoint__keep": 1,
            "mesh__data": 1,
        }
        | fields
    )


class Overfit(NamedTuple):
    """A finished run that memorized its text, and the warnings that it logged."""

    result: Result
    warnings: list[str]


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """Train until the model has memorized its text: the lowest validation loss is at step 10 of 40."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        logging.getLogger("slm_jax").addHandler(handler)
        try:
            result = train(config_of(text), tmp_path_factory.mktemp("run") / "run")
        finally:
            logging.getLogger("slm_jax").removeHandler(handler)
        yield Overfit(result, warnings)


def losses(run):
    """Return the validation losses of a run by step."""
    return {row["step"]: row["val_loss"] for row in read_metrics(run / "metrics.jsonl") if "val_loss" in row}


def test_the_best_checkpoint_is_kept_named_and_used(run, capsys, tmp_path):
    path = run.result.run
    by_step = losses(path)
    best = min(by_step, key=by_step.get)
    assert best < 40
    assert [(each.step, each.is_best, each.loss) for each in list_checkpoints(Run(path))] == [
        (best, True, by_step[best]),
        (40, False, by_step[40]),
    ]
    default, kept, last = (load_run(str(path), step=step) for step in (None, "best", "last"))
    assert (default.step, kept.step, last.step) == (best, best, 40)
    assert default.step_text == f"step {best} (best; last is 40)"
    embedding = np.asarray(default.model.embedding[...])
    assert np.array_equal(embedding, kept.model.embedding[...])
    assert not np.array_equal(embedding, last.model.embedding[...])
    with pytest.raises(UserError, match=rf"no checkpoint of step 7; it has {best} \(best\), 40 \(last\)"):
        load_run(str(path), step=7)
    command.print_summary(Run(path), run.result, 1.0)
    printed = capsys.readouterr().out
    assert f"The best validation was at step {best}: loss {by_step[best]:.3f}" in printed
    assert f"use step {best}; --step last: step 40" in printed
    assert f"Sample of step {best} " in printed
    assert "train further" not in printed
    assert "your own text" not in printed  # it is
    assert generate_command.main(["--run", str(path), "--prompt", "ab", "--max_tokens", "2", "--step", "last"]) is None


def test_an_average_is_of_the_newest_checkpoints(run, tmp_path):
    path = str(run.result.run)
    with pytest.raises(UserError, match=r"holds 1 complete checkpoint, of steps \[40\], not 2 to average"):
        load_run(path, average=2)  # the other one is the best, which is older than those of checkpoint.keep
    best = run.result.trend.best.step
    for step in ("best", best, str(best)):
        with pytest.raises(
            UserError, match=rf"--average 2 is of the newest checkpoints: leave out --step {step}, or give --av"
        ):
            load_run(path, average=2, step=step)
        words = ["--run", path, "--average", "2", "--step", str(step)]
        for command_of, more in (
            (generate_command, ["--prompt", "ab"]),
            (export_command, ["--to", str(tmp_path / "x")]),
        ):
            with pytest.raises(UserError, match=f"leave out --step {step}"):
                command_of.main([*words, *more])
    kept = Run(shutil.copytree(path, tmp_path / "kept"))  # as if more of the newest had been kept
    config = kept.read_config()
    kept.save_config(config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep": 2})}))
    for step in (None, "last"):
        loaded = load_run(str(kept.path), average=2, step=step)
        assert (loaded.step, loaded.step_text) == (40, "mean of 2 checkpoints up to step 40")
        ends = [load_run(path, step=each).model.embedding[...] for each in ("best", "last")]
        assert np.allclose(loaded.model.embedding[...], (np.asarray(ends[0]) + np.asarray(ends[1])) / 2, atol=1e-6)


def test_a_corrupt_choice_is_replaced_only_where_none_was_made(run, tmp_path, caplog):
    path = shutil.copytree(run.result.run, tmp_path / "run")
    best = run.result.trend.best.step
    max((path / "checkpoints" / str(best) / "state").rglob("*"), key=lambda file: file.stat().st_size).write_bytes(b"")
    assert load_run(str(path)).step_text == f"step 40 (last; best is {best})"
    assert f"checkpoint {best} is corrupt and skipped" in caplog.text
    assert load_run(str(path), step="best").step == 40  # the next best
    with pytest.raises(UserError, match=rf"checkpoint of step {best} in .* cannot be used: choose another step"):
        load_run(str(path), step=best)


def test_a_rise_is_reported_once_with_remedies(run):
    by_step = losses(run.result.run)
    best = min(by_step, key=by_step.get)
    risen = next(step for step in sorted(by_step) if step > best and by_step[step] > 1.01 * by_step[best])
    (warning,) = run.warnings
    assert warning.startswith(f"validation loss rises: {by_step[risen]:.3f} at step {risen}, after {by_step[best]:.3f}")
    for remedy in (f"--train.steps {best}", "--train.stop_early", "--model.dropout 0.1", "--init.from_run"):
        assert remedy in warning


def test_the_two_causes_of_a_rise_are_told_apart():
    config = Config.load(**{"optimizer.lr": 0.01})
    trend = Trend().add(1, 3.0, 1.0).add(2, 3.5, 1.2)
    assert "memorize its text" in rise_text(config, trend, 2.0)
    stopping = Config.load(**{"train.stop_early": 1, "init.from_run": "runs/a"})
    assert rise_text(stopping, trend, 2.0).endswith("fewer steps (--train.steps 1), --model.dropout 0.1, or more text")
    assert "training loss does not fall either: try a lower --optimizer.lr (now 0.01)" in rise_text(config, trend, 3.6)
    assert "is not finite at step 3" in rise_text(config, trend.add(3, None, None), None)
    assert not Trend().add(1, 3.0, 1.0).add(2, 3.02, 1.009).has_risen


def test_check_names_overfitting(run):
    path = run.result.run
    rows = read_metrics(path / "metrics.jsonl")
    found = trained.overfitting(rows, 40, "step 10 (best; last is 40)", config_of("x"))
    assert found.verdict == FAIL
    assert "--model.dropout 0.1" in found.details[0]
    assert trained.overfitting(rows, run.result.trend.best.step, "", config_of("x")).verdict == OK
    assert trained.complete_checkpoints(Run(path)).verdict == OK


def test_check_accepts_that_training_deletes_a_checkpoint_meanwhile(run, tmp_path, monkeypatch):
    path = shutil.copytree(run.result.run, tmp_path / "run")
    best = run.result.trend.best.step

    def delete_first(folder, step, verify=trained.verify_checkpoint):
        if step == best:
            shutil.rmtree(path / "checkpoints" / str(best))
        return verify(folder, step)

    monkeypatch.setattr(trained, "verify_checkpoint", delete_first)
    found = trained.complete_checkpoints(Run(path))
    assert (found.verdict, found.found) == (OK, "1 of 1 (40)")


def test_a_run_is_stopped_early_also_after_a_crash(run, text, tmp_path, caplog, capsys, monkeypatch):
    """Two validations after the best one end the run; a killed one stops at the same step with the same weights."""
    config = config_of(text, train__stop_early=2)
    best = run.result.trend.best.step
    end = best + 2 * EVERY

    def fail_at(self, row, write=MetricsWriter.write):
        if row["step"] == end - 3:
            raise RuntimeError("killed")
        write(self, row)

    monkeypatch.setattr(MetricsWriter, "write", fail_at)
    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path / "killed")
    monkeypatch.undo()
    (tmp_path / "killed" / "metrics.jsonl").write_text("")  # the trend is in the checkpoint
    for name in ("whole", "killed"):
        result = train(config, tmp_path / name)
        assert (result.step, result.stopped_by, result.trend.best.step, result.trend.since_best) == (end, None, best, 2)
    command.print_summary(Run(tmp_path / "whole"), result, 1.0)
    assert f"{end} steps of 40: stopped early (train.stop_early), 0:01 in this call." in capsys.readouterr().out
    whole, killed = (load_run(str(tmp_path / name), step="last") for name in ("whole", "killed"))
    assert whole.step == killed.step == end
    assert np.array_equal(whole.model.embedding[...], killed.model.embedding[...])
    caplog.set_level("INFO", "slm_jax")
    assert train(config, tmp_path / "whole").step == end  # finished
    assert f"stopped early: {end} steps are done. To train further: --train.stop_early 0" in caplog.text
    longer = train(config_of(text, train__stop_early=0, train__steps=end + 1), tmp_path / "whole")
    assert longer.step == end + 1


def test_a_run_starts_with_the_best_weights_of_another(run, text, tmp_path, caplog):
    caplog.set_level("INFO", "slm_jax")
    path = run.result.run
    config = config_of(text, init__from_run=str(path), train__steps=1, checkpoint__keep=2)
    train(config, tmp_path / "tuned")
    assert f"initial weights: run {path}, step {run.result.trend.best.step} (best; last is 40)" in caplog.messages
    tuned = load_run(str(tmp_path / "tuned"), step=0)
    assert np.array_equal(tuned.model.embedding[...], load_run(str(path), step="best").model.embedding[...])
