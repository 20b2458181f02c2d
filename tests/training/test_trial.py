"""The speed trial of train.minutes: it fixes the steps, and leaves no trace in what is trained."""

import json
import shutil
import subprocess
import sys
import time

import jax
import pytest

from slm_jax.cli.options import make_config
from slm_jax.run.directory import Run
from slm_jax.run.speed_trial import read_trial
from slm_jax.training import compile_time, trial
from slm_jax.training.compile_time import call_time
from slm_jax.training.train import train
from slm_jax.training.trial import Times, steps_that_fit
from slm_jax.utils.errors import UserError
from tests.helpers import tiny_config
from tests.processes import Process, command_environment, kill_at_random_instants
from tests.runs import assert_same_run

OPTIONS = {
    "model__depth": 1,
    "optimizer__name": "adamw",
    "train__batch_size": 4,
    "tokenizer__vocab_size": 300,
    "data__validation_fraction": 0.2,
    "eval__sample_tokens": 4,
    "eval__every": 3,
    "checkpoint__every": 4,
    "mesh__data": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("\n".join(f"Line {i}: the quick fox, {i * 7 % 13} dogs." for i in range(200)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield str(folder / "text.txt")


@pytest.mark.parametrize("keep_best", [0, 1])
@pytest.mark.parametrize("seconds", [30.0, 100.0, 1000.0])
def test_the_most_steps_that_fit_are_chosen(seconds, keep_best):
    """Counted step by step."""
    config = tiny_config(eval__every=7, checkpoint__every=10, checkpoint__keep_best=keep_best)
    times = Times(steps=10, step=0.31, validation=1.3, first_validation=3.3, save=0.7, compilation=5.0)
    left = seconds - 5.0 - 2.0 - trial._AFTERWARDS

    def needed(steps):
        total = 0.0
        for step in range(1, steps + 1):
            total += 0.31
            validates = step % 7 == 0 or step == steps
            total += 1.3 * validates
            total += 0.7 * (step % 10 == 0 or step == steps or bool(keep_best and validates))
        return total

    steps = steps_that_fit(config, times, seconds)
    assert needed(steps) <= left
    assert needed(steps + 2) > left or needed(steps + 1) > left


def test_the_time_of_compilation_is_measured_apart():
    """A function whose tracing takes 0.2 s calls another one of that kind, and runs for 0.1 s."""

    @jax.jit
    def inner(x):
        time.sleep(0.2)
        return x + 1

    @jax.jit
    def outer(x):
        time.sleep(0.2)
        return inner(x) * 2

    def call():
        outer(1.0).block_until_ready()
        time.sleep(0.1)

    first, second = call_time(call), call_time(call)
    assert first.compilation >= 0.4
    assert 0.1 <= first.execution <= first.total - 0.4
    assert second.compilation < 0.1 <= second.execution
    assert first.total == pytest.approx(first.execution + first.compilation)
    assert compile_time._covered([(1.0, 3.0), (2.0, 2.5), (5.0, 6.0), (2.9, 4.0)]) == 4.0


@pytest.mark.slow
def test_a_long_validation_counts_without_its_compilation(text, tmp_path, monkeypatch):
    """One that is not repeated: the first validation took longer than the limit."""
    monkeypatch.setattr(trial, "_REPEATED_BELOW", 0.0)
    monkeypatch.setattr(trial, "_MIN_SECONDS", 0.01)
    monkeypatch.setattr(trial, "_SHARE", 1e-4)
    monkeypatch.setattr(trial, "steps_that_fit", lambda *_: 1)
    config = tiny_config(**OPTIONS, data__files=(text,), train__minutes=1.0, data__cache=str(tmp_path / "cache"))
    train(config, tmp_path / "run")
    saved = read_trial(Run(tmp_path / "run"))
    assert saved.validation_seconds < 0.5 * saved.first_validation_seconds


def test_no_step_fits_into_too_little_time():
    times = Times(steps=10, step=20.0, validation=1.0, first_validation=1.0, save=1.0, compilation=5.0)
    assert steps_that_fit(tiny_config(), times, 25.0) == 0


def test_the_run_is_that_of_the_steps_that_were_chosen(text, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "slm_jax")
    monkeypatch.setattr(trial, "_MIN_SECONDS", 0.01)
    monkeypatch.setattr(trial, "_SHARE", 1e-4)
    monkeypatch.setattr(trial, "steps_that_fit", lambda *_: 8)
    options = {**OPTIONS, "data__files": (text,)}
    config = tiny_config(**options, train__minutes=1.0)
    result = train(config, tmp_path / "timed")
    run = Run(result.run)
    saved = read_trial(run)
    assert (result.step, saved.steps, run.read_config().train.steps) == (8, 8, 8)
    assert saved.timed_steps >= 1
    assert saved.step_seconds > 0
    assert saved.save_seconds > 0
    assert saved.seconds_before > saved.compile_seconds > 0
    assert not list(run.path.glob(".trial*"))
    train(tiny_config(**options, train__steps=8), tmp_path / "given")
    assert_same_run(run.path, tmp_path / "given")
    # The same command again finds the steps, another time does not change them.
    monkeypatch.setattr(trial, "steps_that_fit", lambda *_: 99)
    assert train(config, run.path).step == 8
    assert train(tiny_config(**options, train__minutes=5.0), run.path).step == 8
    assert "train.minutes 5 does not change them" in caplog.text
    with pytest.raises(UserError, match=r"8 steps of .* are done: give --train\.steps"):
        train(tiny_config(**options, train__minutes=5.0), tmp_path / "given")


def test_a_killed_trial_starts_again(text, tmp_path, monkeypatch):
    options = {**OPTIONS, "data__files": (text,)}
    config = tiny_config(**options, train__minutes=1.0)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "_measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    assert read_trial(Run(tmp_path / "run")) is None
    times = Times(steps=1, step=1e3, validation=0.0, first_validation=0.0, save=0.0, compilation=0.0)
    monkeypatch.setattr(trial, "_measure", lambda _: times)
    with pytest.raises(
        UserError, match=r"took 0:0\d, and no step of 1e\+03 s fits.* --run .*/run --train\.minutes 16\d\d,"
    ):
        train(config, tmp_path / "run")


def test_what_was_prepared_in_too_little_time_is_kept(text, tmp_path, monkeypatch, caplog):
    """The error comes before the trial, and the command that it names does not read the text again."""
    caplog.set_level("INFO", "slm_jax")
    config = tiny_config(**OPTIONS, data__files=(text,), train__minutes=0.5, data__cache=str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "_measure", None)
    with pytest.raises(
        UserError, match=r"preparing the text took 1:0\d.* --run .*/run --train\.minutes [34],"
    ) as error:
        train(config, tmp_path / "run", began=time.monotonic() - 65)
    assert "\n" not in str(error.value)
    assert "learning a tokenizer" in caplog.text
    caplog.clear()
    with pytest.raises(TypeError, match="not callable"):  # the trial begins
        train(config, tmp_path / "run")
    assert "learning a tokenizer" not in caplog.text
    assert "reading" not in caplog.text


def test_steps_and_minutes_exclude_each_other():
    with pytest.raises(UserError, match="leave one out"):
        make_config({"train.steps": 5, "train.minutes": 1.0})
    saved = {"train": {"minutes": 2.0, "steps": 30}}
    assert make_config({"train.steps": 60}, base=saved).train.minutes == 0  # trained further
    assert make_config({}, base=saved).train.minutes == 2


@pytest.mark.slow
def test_a_run_killed_at_any_instant_ends_with_the_same_bits(text, tmp_path):
    """The first kills hit the trial, the later ones the training."""
    command = [sys.executable, "-m", "slm_jax.train", "--config", "minute", "--data.files", text]
    command += [f"--{name.replace('__', '.')}={value}" for name, value in OPTIONS.items()]
    timed = [*command, "--train.minutes", "1.5", "--run", str(tmp_path / "run")]
    environment = command_environment(tmp_path / "cache")

    def start():
        return Process(timed, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    kill_at_random_instants(start, (2.0, 25.0), 6, lambda: shutil.rmtree(tmp_path / "run"))
    process = start()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    steps = json.loads((tmp_path / "run" / "trial.json").read_text())["steps"]
    given = [*command, "--train.steps", str(steps), "--run", str(tmp_path / "given")]
    subprocess.run(given, env=environment, check=True, capture_output=True)
    assert_same_run(tmp_path / "run", tmp_path / "given")
