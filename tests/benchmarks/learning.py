"""Learning per second: python tests/benchmarks/learning.py TEXT … [--seconds 73] [-- --model.dim 128 …]

Each TEXT is a file, or a folder of .txt files. Its first nine tenths are given to `python -m slm_jax.train` in a
process of its own with an empty compilation cache; options after `--` go to that command. Its last tenth (nanoGPT's
split) is seen by nothing before the end, when the run's checkpoints are scored on it in windows of the training length.
The clock starts with the process: imports, the tokenizer's training and compilation are in, scoring is not. The number
of steps that fit comes from a trial of a few steps, unless --steps names it; what the run then took is printed.

nanoGPT's published CPU recipe (4 layers, 128 wide, characters, 2,000 iterations) ends at 2.70 bits per byte on
tinyshakespeare after 73 s on two cores.
"""

from __future__ import annotations

import argparse
import itertools
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
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Not the folder of this file, which holds names of other modules (tokenizer.py).
sys.path[0] = str(ROOT)

CHECKPOINTS = 15
TRIAL_STEPS = 30


class Trained(NamedTuple):
    """A finished run and where its seconds went."""

    run: Path
    start: float  # as time.time()
    seconds: float  # of the whole command
    rows: list[dict[str, float]]  # metrics.jsonl
    used: list[tuple[float, float]]  # (time.time(), processor seconds of the process up to it)

    def clock(self, step: int) -> float:
        """Seconds from the start of the process to the end of a step."""
        return self.rows[step - 1]["time"] - self.start

    def processors(self, step: int) -> float:
        """Processor seconds up to the end of a step: less telling than the clock, but alike on a busy machine."""
        return max((used for moment, used in self.used if moment <= self.rows[step - 1]["time"]), default=math.nan)


def train(text: Path, run: Path, steps: int, options: list[str]) -> Trained:
    """Train with the command; options are its own."""
    settings = {
        "data.files": text,
        # At least one part is always held out; the score here is of other text.
        "data.validation_fraction": 1e-6,
        "eval.every": steps,
        "eval.max_tokens": 1,
        "eval.sample_tokens": 0,
        "checkpoint.every": max(1, steps // CHECKPOINTS),
        "checkpoint.keep": steps,
        "train.steps": steps,
    }
    command = [sys.executable, "-m", "slm_jax.train", "--run", str(run)]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))] + options
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
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)}\nended with status {process.returncode}:\n{errors.read()}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Trained(run, start, seconds, rows, used)


def processor_seconds(pid: int) -> float:
    """Of a running process so far; not a number where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.nan
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def steps_that_fit(text: Path, run: Path, seconds: float, options: list[str]) -> int:
    """From a trial: time to the first step, and the median time of the others."""
    trial = train(text, run, TRIAL_STEPS, options)
    times = [trial.clock(step) for step in range(1, TRIAL_STEPS + 1)]
    each = statistics.median(b - a for a, b in itertools.pairwise(times))
    fit = int((seconds - times[0]) / each)
    print(f"  trial: first step after {times[0]:.1f} s, then {1000 * each:.0f} ms each: {fit} steps in {seconds:.0f} s")
    if fit < TRIAL_STEPS:
        raise SystemExit("fewer steps than the trial took: give more --seconds, or a smaller model")
    return fit


def bits_per_byte(trained: Trained, held_out: str) -> dict[int, float]:
    """Of every checkpoint, by step; the checkpoints are used up."""
    import jax
    import numpy as np

    from slm_jax.data.batches.packed import sequential_batches
    from slm_jax.run.checkpoint import read_params
    from slm_jax.run.directory import Run
    from slm_jax.run.load import load_tokenizer
    from slm_jax.training.train_step import make_steps

    run = Run(trained.run)
    config, tokenizer = run.read_config(), load_tokenizer(run)
    steps = make_steps(config, tokenizer.vocab_size)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(steps.init).params
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    tokens = np.append(tokenizer.encode_array(held_out), tokenizer.token2id["<EOS>"])
    batches = list(sequential_batches(tokens, config.train.batch_size, config.train.sequence_length))
    scores = {}
    while any(folder.name.isdigit() for folder in run.checkpoints.iterdir()):
        params, step = read_params(run.checkpoints, target)
        nats = sum(float(steps.evaluate(params, batch).nll) for batch in batches)
        scores[step] = nats / math.log(2) / len(held_out.encode())
        shutil.rmtree(run.checkpoints / str(step))
    return dict(sorted(scores.items()))


def measure(text: Path, options: argparse.Namespace) -> None:
    """Train on one text and print its score over time."""
    whole = text.read_bytes().decode("utf-8")
    cut = len(whole) * 9 // 10
    held_out = whole[cut:]
    sizes = [len(part.encode()) / 1e6 for part in (whole[:cut], held_out)]
    print(f"{text.name}: {sizes[0]:.2f} MB to train on, {sizes[1]:.2f} MB held out")
    with tempfile.TemporaryDirectory() as name:
        train_file = Path(name) / "train.txt"
        train_file.write_text(whole[:cut], encoding="utf-8", newline="")
        steps = options.steps or steps_that_fit(train_file, Path(name) / "trial", options.seconds, options.command)
        trained = train(train_file, Path(name) / "run", steps, options.command)
        scores = bits_per_byte(trained, held_out)
    passed = next((step for step, score in scores.items() if score <= options.target), None)
    for step, score in scores.items():
        print(
            f"  step {step:6}  {trained.clock(step):7.1f} s  {trained.processors(step):7.1f} s of processors  "
            f"{score:.3f} bits per byte"
        )
    reached = "not reached" if passed is None else f"passed by {trained.clock(passed):.1f} s (step {passed})"
    print(
        f"  {scores[steps]:.3f} bits per byte after {trained.clock(steps):.1f} s, {steps} steps; {options.target:.2f} "
        f"{reached}; the command took {trained.seconds:.1f} s",
        flush=True,
    )


def main() -> None:
    """Measure every text."""
    arguments, command = sys.argv[1:], []
    if "--" in arguments:
        arguments, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--seconds", type=float, default=73.0, help="from the start of the process to its last step")
    parser.add_argument("--steps", type=int, default=0, help="in place of a trial")
    parser.add_argument("--target", type=float, default=2.70, help="bits per byte to say the time of")
    options = parser.parse_args(arguments)
    options.command = command
    for path in options.texts:
        for text in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
            measure(text, options)


if __name__ == "__main__":
    main()
