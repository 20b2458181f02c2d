"""Commands as users run them: real processes, files and signals."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from slm_jax.cli import train as train_command
from slm_jax.utils.command import command_errors
from slm_jax.utils.errors import UserError
from tests.helpers import ONE_BLOCK, words_of
from tests.processes import Process, command_environment, kill_at_random_instants, wait_for
from tests.runs import assert_same_run, read_rows, saved_arrays, without_clock

TINY = words_of({**ONE_BLOCK, "train.batch_size": 4, "optimizer.warmup_steps": 2, "eval.sample_tokens": 12})


@pytest.fixture
def workspace(tmp_path, monkeypatch, capsys, caplog):
    """Return a folder with text, in which commands can be run."""
    text = "".join(f"Line {i}: the quick brown fox jumps over {i * 7 % 13} lazy dogs.\n" for i in range(600))
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in ("slm_jax.utils.process", "slm_jax.cli.generate"):  # settings of a process of its own
        monkeypatch.setattr(f"{module}.tune_process", lambda deterministic=False: None)
    return Workspace(tmp_path, capsys, caplog)


class Workspace:
    def __init__(self, path, capsys, caplog):
        self.path = path
        self.environment = command_environment(path / "cache")
        self.capsys = capsys
        self.caplog = caplog

    def start(self, module, *args):
        command = [sys.executable, "-m", module, *map(str, args)]
        return Process(
            command, cwd=self.path, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, module, *args):
        process = self.start(module, *args)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def train(self, *args):
        return self.run("slm_jax.train", *TINY, "--data.files", "text.txt", *args)

    def call(self, name, *args):
        """Run a command in the process of the tests, which takes a third of the time, and return what `run` returns."""
        main = importlib.import_module(f"slm_jax.cli.{name}").main
        self.capsys.readouterr()
        self.caplog.clear()
        status = 0
        with self.caplog.at_level("INFO", "slm_jax"):
            try:
                with command_errors():
                    main([*map(str, args), *(("--mesh.data", "1") if name == "train" else ())])
            except SystemExit as end:
                status = end.code
        out, err = self.capsys.readouterr()
        return status, out, "".join(f"{message}\n" for message in self.caplog.messages) + err

    def rows(self, run):
        return read_rows(self.path / run)

    def refused(self, module, *args):
        """Return the error message of a command that must exit with status 2 and no traceback."""
        return self.message(*self.run(module, *args))

    def call_refused(self, name, *args):
        """Return the error message of a command in this process that must exit with status 2."""
        return self.message(*self.call(name, *args))

    @staticmethod
    def message(status, _, err):
        assert status == 2, err
        assert "Traceback" not in err
        return err.partition("error: ")[2]


def test_text_to_model_to_text(workspace):
    status, out, err = workspace.train("--run", "run", "--train.steps", "40", "--eval.every", "20", "--log.every", "10")
    assert status == 0, err
    rows = workspace.rows("run")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert {"loss", "lr", "grad_norm", "tokens"} <= rows[0].keys()
    assert [row["step"] for row in rows if "val_bits_per_byte" in row] == [20, 40]
    assert rows[-1]["val_loss"] < rows[19]["val_loss"]
    assert "compiling" in err
    assert re.search(r"step 10/40 +loss \d.*tokens/s, MFU .*ETA", err)
    assert re.search(r"python -m slm_jax\.generate --run run --prompt 'Line \d+: the quick'\n", out)
    assert "bits per byte" in out
    assert (workspace.path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (workspace.path / "run" / "samples.md").read_text().count("## Step") == 2
    sample = (workspace.path / "run" / "samples.md").read_text().rpartition("## Step 40")[2].strip("\n").splitlines()
    assert "\n".join(line.removeprefix("    ") for line in sample) in out

    status, text, err = workspace.run("slm_jax.generate", "--run", "run", "--prompt", "Line 5", "--max_tokens", "20")
    assert status == 0, err
    assert text.startswith("Line 5")
    assert len(text) > 10
    again = workspace.call("generate", "--run", "run", "--prompt", "Line 5", "--max_tokens", "20")
    assert again[1] == text
    seeded = ("--max_tokens", "20", "--seed", "1")
    assert workspace.call("generate", "--run", "run", "--prompt", "Line 5", *seeded)[1] != text
    more = ("--prompt", "Line", "--prompt", "", "--samples", "2", "--format", "jsonl", "--max_tokens", "20")
    status, lines, err = workspace.call("generate", "--run", "run", "--prompt", "Line 5", *more)
    assert status == 0, err
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["prompt"] for row in rows] == ["Line 5", "Line 5", "Line", "Line", "", ""]
    assert rows[0]["prompt"] + rows[0]["text"] == text.removesuffix("\n")  # alone or among others
    assert rows[1]["text"] != rows[0]["text"]
    unknown = workspace.call_refused("generate", "--run", "run", "--prompt", "x", "--suppress", "<FOO>")
    assert "'<FOO>' is not a token of this run: `python -m tokenizer inspect run/tokenizer.hybtok` lists" in unknown
    assert "no run in nowhere" in workspace.refused("slm_jax.generate", "--run", "nowhere", "--prompt", "x")
    cold = ("--prompt", "x", "--temperature", "-1")
    assert "temperature -1" in workspace.call_refused("generate", "--run", "run", *cold)


def test_finished_run_is_reported_and_can_be_extended(workspace):
    options = (*TINY, "--data.files", "text.txt", "--run", "run", "--train.steps", "6")
    assert workspace.call("train", *options)[0] == 0
    before = workspace.rows("run")
    status, _, err = workspace.call("train", *options)
    assert status == 0
    assert "finished: 6 steps are done" in err
    assert workspace.rows("run") == before
    assert workspace.call("train", "--run", "run", "--train.steps", "9")[0] == 0  # its own config, more steps
    assert workspace.rows("run")[:6] == before
    assert [row["step"] for row in workspace.rows("run")] == list(range(1, 10))

    conflicts = ("--train.seed", "5", "--optimizer.lr", "0.5")
    text = workspace.call_refused("train", "--run", "run", "--train.steps", "9", *conflicts)
    assert "2 options differ:\n" in text
    assert "--init.from_run run it starts with the weights of this run" in text
    assert "train.seed: 0 saved, 5 current" in text
    assert "optimizer.lr" in text
    assert len(workspace.rows("run")) == 9


def test_invalid_usage_ends_with_one_message_and_leaves_nothing(workspace):
    (workspace.path / "empty.txt").write_text("")
    (workspace.path / "latin.txt").write_bytes(b"abc\xff")
    (workspace.path / "tiny.txt").write_text("too short")
    (workspace.path / "short.txt").write_text("Too short to train on. " * 99)
    messages = {
        ("--model.dims", "3"): "unknown option --model.dims, perhaps you meant --model.dim",
        ("--config", "quikstart"): "perhaps you meant quickstart",
        ("--data.files", "none*.txt"): "no file matches none*.txt",
        ("--data.files", "empty.txt"): "empty.txt is empty",
        ("--data.files", "latin.txt"): "not UTF-8: byte 0xff at offset 3",
        (
            "--data.files",
            "tiny.txt",
        ): "too short to be split into training and validation: add more (9 characters in 1 document)",
        ("--data.files", "short.txt"): "but one batch takes 16 x 256 = 4,096",
        ("--tokenizer.path", "nowhere"): "nowhere",
        ("--resume",): "there is no run",
    }
    for args, expected in messages.items():
        with pytest.raises(UserError, match=re.escape(expected)):
            train_command.main(args)
    for args in (("--model.dims", "3"), ("--data.files", "short.txt")):  # without JAX, and with it
        assert messages[args] in workspace.refused("slm_jax.train", *args)
    runs = workspace.path / "runs"
    assert not runs.exists() or not list(runs.iterdir())


@pytest.mark.slow
def test_mistake_can_be_corrected_in_the_same_run(workspace):
    workspace.refused("slm_jax.train", *TINY, "--data.files", "text.txt", "--run", "run", "--train.batch_size", "4000")
    assert workspace.train("--run", "run", "--train.steps", "3")[0] == 0
    assert "more than --train.steps 2" in workspace.refused("slm_jax.train", "--run", "run", "--train.steps", "2")
    (workspace.path / "text.txt").write_text("other text now")
    status, _, err = workspace.run("slm_jax.train", "--run", "run", "--train.steps", "4")
    assert status == 0
    assert "the text has changed since this run was started" in err


def test_two_processes_do_not_train_one_run(workspace):
    first = workspace.start(
        "slm_jax.train", *TINY, "--data.files", "text.txt", "--run", "run", "--train.steps", "100000"
    )
    wait_for(lambda: (workspace.path / "run" / "config.toml").exists(), first)
    assert "another process is training run" in workspace.call_refused(
        "train", *TINY, "--data.files", "text.txt", "--run", "run", "--train.steps", "100000"
    )
    first.kill()
    first.communicate()


LONG = ("--train.steps", "60", "--checkpoint.every", "7", "--eval.every", "20")
# Every policy with state between steps: best and permanent checkpoints, statistics, skipped batches.
CAREFUL = (*LONG, "--checkpoint.keep_best", "1", "--checkpoint.keep_every", "14", "--health.on_spike", "skip")
CAREFUL += ("--health.window", "4", "--health.deviations", "2", "--health.warmup_steps", "5", "--log.layers", "5")


def newest_row(run):
    """Return the step of the newest complete row."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def is_writing(run):
    return any("tmp" in path.name for path in (run / "checkpoints").glob("*"))


# Instants at which a kill may cause damage, as observed from outside.
INSTANTS = {
    "before the first checkpoint": lambda run: newest_row(run) >= 3,
    "in the middle of a write": is_writing,
    "during validation": lambda run: newest_row(run) == 19,  # row 20 is written when its scores are known
    "at the last step": lambda run: newest_row(run) >= 59,
}


@pytest.mark.parametrize(
    "instants",
    [
        ("in the middle of a write", "during validation"),
        pytest.param(("before the first checkpoint", "at the last step"), marks=pytest.mark.slow),
    ],
    ids=["quick", "slow"],
)
def test_killed_at_bad_instants_ends_bit_identical(workspace, instants):
    """With every policy that has state between steps."""
    given = (*TINY, "--data.files", "text.txt", *CAREFUL)
    assert workspace.call("train", *given, "--run", "whole")[0] == 0
    run = workspace.path / "killed"
    for instant in instants:
        process = workspace.start("slm_jax.train", *TINY, "--data.files", "text.txt", "--run", "killed", *CAREFUL)
        wait_for(lambda: process.poll() is not None or INSTANTS[instant](run), None)  # noqa: B023
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), instant
    status, _, err = workspace.call("train", *given, "--run", "killed")
    assert status == 0, err
    assert_same_run(workspace.path / "whole", run)
    assert workspace.rows("killed")[-1]["skipped"] > 0
    steps = [sorted(int(p.name) for p in (each / "checkpoints").iterdir()) for each in (workspace.path / "whole", run)]
    assert steps[0] == steps[1]
    assert {14, 28, 42, 56, 60} <= set(steps[0])
    assert (workspace.path / "whole" / "layers.jsonl").read_text() == (run / "layers.jsonl").read_text()


@pytest.mark.slow
def test_killed_at_random_instants_ends_bit_identical(workspace):
    begin = time.monotonic()
    assert workspace.train("--run", "whole", *LONG)[0] == 0
    seconds = time.monotonic() - begin
    kill_at_random_instants(
        lambda: workspace.start("slm_jax.train", *TINY, "--data.files", "text.txt", "--run", "killed", *LONG),
        (0.1 * seconds, 0.9 * seconds),
        kills=12,
        begin_again=lambda: shutil.rmtree(workspace.path / "killed"),
    )
    assert workspace.train("--run", "killed", *LONG)[0] == 0
    assert_same_run(workspace.path / "whole", workspace.path / "killed")


@pytest.mark.slow
def test_killed_while_starting(workspace):
    """A kill at the worst instants leaves half a config, half a corpus, half a row, half a sample."""
    run = workspace.path / "begun"
    run.mkdir()
    (run / "config.toml.partial").write_text("[mod")
    assert workspace.train("--run", "begun", "--train.steps", "21", *LONG[2:])[0] == 0
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 22, "los')
    with (run / "samples.md").open("a") as file:
        file.write("\n## Step 40\n\n    half a te")
    shutil.copytree(run / "corpus", run / "corpus.partial")
    assert workspace.train("--run", "begun", *LONG)[0] == 0
    rows = workspace.rows("begun")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert "half a te" not in (run / "samples.md").read_text()


@pytest.mark.slow
def test_loser_of_a_race_leaves_the_winner_alone(workspace):
    """Two processes start one new run at the same time: one trains, the other is refused."""
    args = [*TINY, "--data.files", "text.txt", "--run", "run", "--train.steps", "8"]
    both = [workspace.start("slm_jax.train", *args) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) in ([0, 2], [0, 0])  # 0, 0: one was done before the other
    assert all("Traceback" not in text for text in errors)
    assert len(workspace.rows("run")) == 8


def test_divergence_is_reported_before_it_is_saved(workspace):
    text = workspace.call_refused(
        "train", *TINY, "--data.files", "text.txt", "--run", "run", "--optimizer.lr", "1e12",
        "--checkpoint.every", "1", "--train.steps", "30",
    )  # fmt: skip
    assert "training has diverged" in text
    assert "NaN" not in (workspace.path / "run" / "metrics.jsonl").read_text()
    _, arrays = saved_arrays(workspace.path / "run" / "checkpoints")
    assert all(np.isfinite(value).all() for value in arrays.values() if value.dtype.kind == "f")


@pytest.mark.slow
def test_on_four_devices_then_on_one(workspace):
    workspace.environment = command_environment(workspace.path / "cache", devices=4)
    status, _, err = workspace.train("--run", "run", "--train.steps", "6")
    assert status == 0
    assert "4 x CPU" in err
    workspace.environment = command_environment(workspace.path / "cache")
    assert workspace.run("slm_jax.train", "--run", "run", "--train.steps", "8")[0] == 0
    assert len(workspace.rows("run")) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_second_signal_ends_training_at_once(workspace, number):
    """The first signal waits for the end of a step that validates for an hour."""
    args = ("--eval.every", "3", "--eval.sample_tokens", "1000000", "--train.steps", "100", "--checkpoint.every", "1")
    process = workspace.start("slm_jax.train", *TINY, "--data.files", "text.txt", "--run", "run", *args)
    wait_for(lambda: (workspace.path / "run" / "checkpoints" / "2").exists(), process)
    process.send_signal(number)
    assert any("a second Ctrl-C stops at once" in line for line in iter(process.stderr.readline, ""))
    process.send_signal(number)
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert time.monotonic() - begin < 30
    assert workspace.call("train", "--run", "run", "--train.steps", "2")[0] == 0  # what was saved is whole


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_the_run_resumes(workspace, number, status):
    process = workspace.start(
        "slm_jax.train", *TINY, "--data.files", "text.txt", "--run", "run", "--train.steps", "100000"
    )
    metrics = workspace.path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    done = len(workspace.rows("run"))
    assert f"after step {done}, saved" in out
    code, _, err = workspace.call("train", "--run", "run", "--train.steps", str(done + 2))
    assert code == 0
    assert f"continuing after step {done}" in err
    assert len(workspace.rows("run")) == done + 2


def read_until_closed(descriptor):
    with contextlib.suppress(OSError):
        while os.read(descriptor, 65536):
            pass


def test_closing_the_terminal_saves(workspace):
    controller, terminal = os.openpty()
    command = [sys.executable, "-m", "slm_jax.train", *TINY, "--data.files", "text.txt", "--run", "run"]
    with Process(
        [*command, "--train.steps", "100000"],
        cwd=workspace.path,
        env=workspace.environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    ) as process:
        os.close(terminal)
        threading.Thread(target=read_until_closed, args=(controller,), daemon=True).start()
        metrics = workspace.path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
        os.close(controller)
        for number in (signal.SIGHUP, signal.SIGHUP):  # by the kernel and by the shell
            process.send_signal(number)
            time.sleep(0.05)
        assert process.wait(120) == 128 + signal.SIGHUP
    assert saved_arrays(workspace.path / "run" / "checkpoints")[0] == len(workspace.rows("run"))


@pytest.mark.slow
def test_nohup_is_respected(workspace):
    command = ["nohup", sys.executable, "-m", "slm_jax.train", *TINY, "--data.files", "text.txt", "--run", "run"]
    with Process(
        [*command, "--train.steps", "60"],
        cwd=workspace.path,
        env=workspace.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        metrics = workspace.path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
        process.send_signal(signal.SIGHUP)
        assert process.wait(120) == 0
    assert len(workspace.rows("run")) == 60


@pytest.mark.slow
def test_corrupt_checkpoint_is_reported_and_skipped(workspace):
    assert workspace.train("--run", "whole", *LONG)[0] == 0
    shutil.copytree(workspace.path / "whole", workspace.path / "hurt")
    newest = workspace.path / "hurt" / "checkpoints" / "60"
    for file in (newest / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    status, _, err = workspace.train("--run", "hurt", *LONG)
    assert status == 0, err
    assert "checkpoint 60 is corrupt and skipped" in err
    assert "continuing after step 56" in err
    newest.rename(workspace.path / "gone")
    for file in (workspace.path / "hurt" / "checkpoints" / "damaged" / "60" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"")
    shutil.copytree(workspace.path / "hurt" / "checkpoints" / "damaged" / "60", newest)
    status, _, err = workspace.run("slm_jax.generate", "--run", "hurt", "--prompt", "Line", "--max_tokens", "3")
    assert status == 0
    assert "checkpoint 60 is corrupt and skipped" in err
    assert "WARNING" not in err
    shutil.rmtree(newest)
    (workspace.path / "gone").rename(newest)
    assert_same_run(workspace.path / "whole", workspace.path / "hurt")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["padded", "segmented"])
def test_instructions_resume_bit_identical_in_other_batch_modes(workspace, mode):
    tasks = ({"instruction": f"Say {i}" * (i % 5 + 1), "output": f"{i} " * (i % 9 + 1)} for i in range(300))
    (workspace.path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    args = [*TINY, "--data.files", "tasks.jsonl", "--data.template", "Q {instruction}\\nA ", "--data.mode", mode]
    args += ["--checkpoint.every", "6", "--eval.every", "7", "--train.steps", "14", "--optimizer.schedule", "constant"]
    status, _, err = workspace.run("slm_jax.train", *args, "--run", "whole")
    assert status == 0, err
    assert ("% padding" in err) == ("compiling for rows of" in err) == (mode == "padded")
    rows = workspace.rows("whole")
    assert all(0 < row["bytes"] < 4 * row["tokens"] for row in rows)
    assert len({row["tokens"] for row in rows}) > 1  # prompts are not predicted
    assert all(row["input_tokens"] > row["tokens"] for row in rows)
    partial = sum(row["input_tokens"] % 4 > 0 for row in rows)  # of a segmented epoch only the last window
    assert partial > 2 if mode == "padded" else partial <= 2
    assert rows[0]["tokens_per_second"] * rows[0]["seconds"] == pytest.approx(rows[0]["input_tokens"])
    assert workspace.run("slm_jax.train", *args, "--run", "parts", "--train.steps", "7")[0] == 0
    shutil.rmtree(workspace.path / "cache" / "slm_jax" / "data")
    assert workspace.run("slm_jax.train", *args, "--run", "parts")[0] == 0
    assert without_clock(workspace.rows("parts")) == without_clock(rows)
    assert saved_arrays(workspace.path / "whole" / "checkpoints")[0] == 14


@pytest.mark.slow
def test_full_disk_is_one_error_line_and_loses_nothing_saved(workspace):
    """On a separate file system of 3 MB, where the first checkpoints fit and later ones do not."""
    small = workspace.path / "small"
    small.mkdir()
    script = (
        'mount -t tmpfs -o size=3m tmpfs small || exit 77; "$@" --train.steps 5; echo "first: $?"; '
        'cp -r small/run kept; head -c 9m /dev/zero > small/fill; "$@" --train.steps 9; echo "second: $?"; '
        'rm small/fill; "$@" --train.steps 9; echo "third: $?"'
    )
    command = [sys.executable, "-m", "slm_jax.train", *TINY, "--data.files", "text.txt", "--run", "small/run"]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command],
        cwd=workspace.path, env=workspace.environment, text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr.partition("\n")[0]:
        pytest.skip("this system lets no user mount a file system")
    assert re.findall(r"(first|second|third): (\d+)", done.stdout) == [("first", "0"), ("second", "2"), ("third", "0")]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "no space left on the disk" in errors[0]
    assert "Traceback" not in done.stderr
    assert "continuing after step 5" in done.stderr


@pytest.mark.parametrize(
    "platform", ["cuda", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tpu", "bogus"))]
)
def test_a_platform_that_is_not_here_is_one_line(workspace, platform):
    workspace.environment |= {"JAX_PLATFORMS": platform, "TPU_SKIP_MDS_QUERY": "1"}
    stored = Path(__file__).parents[1] / "run" / "run_0.1.0"
    commands = (
        ("slm_jax.train", "--data.files", "text.txt"),
        ("slm_jax.generate", "--run", stored, "--prompt", "x"),
    )
    for command in commands:
        error = workspace.refused(*command)
        assert error.startswith(f"JAX_PLATFORMS={platform}: JAX cannot use such a device here")
        assert error.count("\n") == 1
    assert not list((workspace.path / "runs").glob("*/corpus"))
