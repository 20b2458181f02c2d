"""Learning per second: python tests/benchmarks/learning.py TEXT … [--rival] [-- --model.dim 128 …]

Each TEXT is a file or a folder of .txt files. `python -m slm_jax.train` trains on its first nine tenths in a separate
process with an empty compilation cache; options after `--` are passed to that command. The last tenth (nanoGPT's split)
is used only at the end, to score the checkpoints of the run in windows of the training length. The time includes
imports, learning the tokenizer and compilation, but not scoring. The number of steps is that of the speed trial of
train.minutes, made by another process before the time begins, unless --steps is given; the time that the run took is
printed.

nanoGPT's published CPU recipe (4 layers, width 128, characters, 2,000 iterations) reached 2.70 bits per byte on
tinyshakespeare after 73 s on two cores of another processor, which are the defaults of --target and --seconds. With
--rival it is trained first (`nanogpt_rival.py`, needs torch), and its time on this machine is the time to train.

--start N measures the start instead: N runs of 40 steps with an empty cache (compiled programs, tokenizer, text), each
followed by one with the cache that it has filled; --against DIR takes turns with another checkout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
sys.path[0] = str(ROOT)

RIVAL = Path(__file__).with_name("nanogpt_rival.py")
CHECKPOINTS = 15
NEVER = 2**31 - 1


class Trained(NamedTuple):
    """A finished run with its timing."""

    run: Path
    start: float  # as time.time()
    seconds: float  # duration of the whole command
    rows: list[dict[str, float]]  # metrics.jsonl
    used: list[tuple[float, float]]  # (time.time(), processor seconds of the process so far)

    def clock(self, step: int) -> float:
        """Return the seconds from the start of the process to the end of a step."""
        return self.rows[step - 1]["time"] - self.start

    def processors(self, step: int) -> float:
        """Return the processor seconds up to the end of a step; other programs disturb them less than the clock."""
        return max((used for moment, used in self.used if moment <= self.rows[step - 1]["time"]), default=math.nan)


def command_line(text: Path, run: Path, options: list[str], **settings: object) -> list[str]:
    """Return the training command with settings of the benchmark, and additional options."""
    fixed = {
        "data.files": text,
        # The minimum: one part is always held out. The score of this benchmark uses other text.
        "data.validation_fraction": 1e-6,
        "eval.max_tokens": 1,
        "eval.sample_tokens": 0,
    }
    settings = fixed | {name.replace("__", "."): value for name, value in settings.items()}
    command = [sys.executable, "-m", "slm_jax.train", "--run", str(run)]
    return command + [part for name, value in settings.items() for part in (f"--{name}", str(value))] + options


def train(text: Path, run: Path, steps: int, options: list[str]) -> Trained:
    """Run the training command with additional options and return its timing."""
    command = command_line(
        text,
        run,
        options,
        train__steps=steps,
        eval__every=steps,
        checkpoint__every=max(1, steps // CHECKPOINTS),
        checkpoint__keep=steps,
    )
    used = []
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as errors:
        start = time.time()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "XDG_CACHE_HOME": cache},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        while process.poll() is None:
            used.append((time.time(), processor_seconds(process.pid)))
            time.sleep(0.2)
        seconds = time.time() - start
        if process.returncode:
            exit_with_errors(process, errors)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Trained(run, start, seconds, rows, used)


def exit_with_errors(process: subprocess.Popen[Any], errors: IO[str]) -> NoReturn:
    """End with the command of a process that has failed, and what it wrote to its standard error."""
    errors.seek(0)
    raise SystemExit(f"{' '.join(process.args)}\nended with status {process.returncode}:\n{errors.read()}")


def processor_seconds(pid: int) -> float:
    """Return the processor seconds of a running process; NaN where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.nan
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def steps_that_fit(text: Path, run: Path, seconds: float, options: list[str]) -> int:
    """Return the steps that fit into a time by the speed trial of `train.minutes`, from the start of the process."""
    from slm_jax.run.directory import Run
    from slm_jax.run.speed_trial import read_trial
    from slm_jax.training.trial import Times
    from slm_jax.training.trial import steps_that_fit as by_trial

    command = command_line(text, run, options, train__minutes=10, eval__every=NEVER, checkpoint__every=NEVER)
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as errors:
        start = time.time()
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        while (trial := read_trial(Run(run))) is None:
            if process.poll() is not None:
                exit_with_errors(process, errors)
            time.sleep(0.05)
        started = Run(run).trial.stat().st_mtime - start - trial.seconds_before
        process.kill()
        process.wait()
    times = Times(
        steps=trial.timed_steps,
        step=trial.step_seconds,
        validation=trial.validation_seconds,
        first_validation=trial.first_validation_seconds,
        save=trial.save_seconds,
        compilation=trial.compile_seconds,
    )
    left = seconds - started - trial.preparation_seconds - CHECKPOINTS * trial.save_seconds
    fit = by_trial(Run(run).read_config(), times, left, afterwards=0.0)
    print(
        f"  trial: {started + trial.preparation_seconds + trial.compile_seconds:.1f} s before the first step, then "
        f"{1000 * trial.step_seconds:.0f} ms per step: {fit} in {seconds:.0f} s"
    )
    if fit < CHECKPOINTS:
        raise SystemExit("fewer steps than checkpoints: raise --seconds or use a smaller model")
    return fit


def train_rival(text: Path, held_out: Path) -> float:
    """Train by the recipe of nanoGPT and print its score; return the seconds of its process without scoring."""
    command = [sys.executable, str(RIVAL), str(text), str(held_out)]
    with tempfile.TemporaryFile("w+") as errors:
        start = time.time()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        seconds = time.time() - start
        rest = process.communicate()[0]
        if process.returncode:
            exit_with_errors(process, errors)
    score = json.loads(rest)["bits_per_byte"]
    print(f"  nanoGPT's recipe: {score:.3f} bits per byte after {seconds:.1f} s", flush=True)
    return seconds


def bits_per_byte(trained: Trained, held_out: str) -> dict[int, float]:
    """Return the bits per byte of each checkpoint, by step. Deletes the checkpoints."""
    import jax
    import numpy as np

    from slm_jax.data.batches.packed import sequential_batches
    from slm_jax.run.directory import Run
    from slm_jax.run.load import load_tokenizer
    from slm_jax.run.read_checkpoint import read_params
    from slm_jax.training.steps import make_steps

    run = Run(trained.run)
    config = run.read_config()
    tokenizer = load_tokenizer(run)
    steps = make_steps(config, tokenizer.vocab_size)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(steps.init).params
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    tokens = np.append(tokenizer.encode_array(held_out), tokenizer.token2id["<EOS>"])
    batches = list(sequential_batches(tokens, config.train.batch_size, config.train.sequence_length))
    scores = {}
    while any(folder.name.isdigit() for folder in run.checkpoints.iterdir()):
        params, step = read_params(run.checkpoints, target, moving_average=bool(config.optimizer.average_decay))
        nats = sum(float(steps.evaluate(params, batch).nll) for batch in batches)
        scores[step] = nats / math.log(2) / len(held_out.encode())
        shutil.rmtree(run.checkpoints / str(step))
    return dict(sorted(scores.items()))


def measure(text: Path, options: argparse.Namespace) -> None:
    """Train on one text and print the score over time."""
    document = text.read_bytes().decode("utf-8")
    cut = len(document) * 9 // 10
    held_out = document[cut:]
    sizes = [len(part.encode()) / 1e6 for part in (document[:cut], held_out)]
    print(f"{text.name}: {sizes[0]:.2f} MB for training, {sizes[1]:.2f} MB held out")
    with tempfile.TemporaryDirectory() as name:
        train_file = Path(name) / "train.txt"
        train_file.write_text(document[:cut], encoding="utf-8", newline="")
        seconds = options.seconds
        if options.rival:
            held_out_file = Path(name) / "held_out.txt"
            held_out_file.write_text(held_out, encoding="utf-8", newline="")
            seconds = train_rival(train_file, held_out_file)
        steps = options.steps or steps_that_fit(train_file, Path(name) / "trial", seconds, options.command)
        trained = train(train_file, Path(name) / "run", steps, options.command)
        scores = bits_per_byte(trained, held_out)
    passed = next((step for step, score in scores.items() if score <= options.target), None)
    for step, score in scores.items():
        print(
            f"  step {step:6}  {trained.clock(step):7.1f} s  {trained.processors(step):7.1f} s of processor time  "
            f"{score:.3f} bits per byte"
        )
    reached = "not reached" if passed is None else f"reached after {trained.clock(passed):.1f} s (step {passed})"
    print(
        f"  {scores[steps]:.3f} bits per byte after {trained.clock(steps):.1f} s, {steps} steps; {options.target:.2f} "
        f"{reached}; the command took {trained.seconds:.1f} s",
        flush=True,
    )


def measure_start(text: Path, options: argparse.Namespace) -> None:
    """Print the seconds from the start of the command to the end of its first step, and to its own end."""
    roots = [ROOT] + ([options.against.resolve()] if options.against else [])
    times: dict[tuple[Path, str, str], list[float]] = {}
    for _ in range(options.start):
        for root in roots:
            with tempfile.TemporaryDirectory() as folder:
                for cache in ("empty", "filled"):
                    run = Path(folder) / cache
                    command = [sys.executable, "-m", "slm_jax.train", "--data.files", str(text), "--run", str(run)]
                    command += ["--train.steps", "40", "--eval.every", "40", *options.command]
                    environment = {**os.environ, "XDG_CACHE_HOME": folder, "PYTHONPATH": str(root)}
                    start = time.time()
                    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
                    end = time.time()
                    first = json.loads(next((run / "metrics.jsonl").open()))["time"]
                    times.setdefault((root, cache, "first step"), []).append(first - start)
                    times.setdefault((root, cache, "end"), []).append(end - start)
    for (root, cache, event), seconds in times.items():
        line = f"{root}, {cache} cache, {event}: {spread(seconds)} s"
        if root != ROOT:
            ratios = [own / other for own, other in zip(times[ROOT, cache, event], seconds, strict=True)]
            line += f"; {ROOT} takes {spread(ratios)} times that"
        print(line, flush=True)


def spread(values: list[float]) -> str:
    """Return the median and the range of values."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    command = []
    if "--" in arguments:
        arguments, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument(
        "--seconds", type=float, default=73.0, help="time from the start of the process to its last step"
    )
    parser.add_argument("--steps", type=int, default=0, help="number of steps; 0: estimated by a trial")
    parser.add_argument("--target", type=float, default=2.70, help="bits per byte whose time is reported")
    parser.add_argument("--rival", action="store_true", help="train by nanoGPT's recipe first, and as long as it")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="measure the start only, N times")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout that --start is compared with")
    options = parser.parse_args(arguments)
    options.command = command
    for path in options.texts:
        for text in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
            (measure_start if options.start else measure)(text.resolve(), options)


if __name__ == "__main__":
    main()
