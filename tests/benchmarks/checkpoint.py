"""Cost of checkpoints and time to resume after a kill: python tests/benchmarks/checkpoint.py [--config NAME]

share    In one process, blocks of steps with one save (until it is complete on disk) alternate with blocks without one.
         Reports the time that a save adds to its block, as a share of the steps between two saves of the config
         (checkpoint.every). Target: at most 2 %.
restart  The training command is killed with SIGKILL and restarted, with compiled programs and text cached. Reports the
         seconds until it has taken its next step. Target: at most 20 s on two cores.

Results are medians with quartiles, in wall-clock time and in processor time, which other programs disturb less.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
sys.path[0] = str(ROOT)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart", help="preset or TOML file")
    parser.add_argument("--rounds", type=int, default=8, help="blocks with and without a save")
    parser.add_argument("--block", type=int, default=8, help="steps per block")
    parser.add_argument("--kills", type=int, default=3, help="restarts to measure")
    parser.add_argument("--only", choices=["share", "restart"], help="measure only this")
    args = parser.parse_args()
    from slm_jax.utils.process import tune_process

    tune_process()
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "restart":
            measure_share(args, Path(folder) / "share")
        if args.only != "share":
            measure_restart(args, Path(folder))


def measure_share(args: argparse.Namespace, folder: Path) -> None:
    """Print the share of the training time that saving takes."""
    import jax
    import numpy as np

    from slm_jax.config.schema import Config
    from slm_jax.run.checkpoint import Checkpoints
    from slm_jax.training.steps import make_steps

    config = Config.load(args.config)
    vocab = config.tokenizer.vocab_size
    steps = make_steps(config, vocab)
    shape = (config.train.batch_size, config.train.sequence_length)
    ids = np.random.default_rng(0).integers(0, vocab, shape).astype(np.int32)
    batch = {"input_ids": ids, "labels": np.roll(ids, -1, axis=1)}
    state = steps.init()
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    taken = {}
    with Checkpoints(folder, config.checkpoint) as checkpoints:

        def block(number: int, saves: bool) -> None:
            nonlocal state
            begin = time.perf_counter(), time.process_time()
            for i in range(args.block):
                state, metrics = steps.train(state, batch)
                if saves and i == 0:
                    checkpoints.save(
                        number, {"params": state.params, "opt_state": state.opt_state}, {"config": config.flat()}
                    )
                checkpoints.check()
                float(metrics["loss"])
            checkpoints.wait()
            taken.setdefault(saves, []).append((time.perf_counter() - begin[0], time.process_time() - begin[1]))

        for number in range(-1, args.rounds):  # the first round compiles and is discarded
            if number == 0:
                taken.clear()
            for saves in (True, False) if number % 2 else (False, True):
                block(number + 2, saves)
    print(f"{args.config}: {size:.0f} MB per checkpoint, every {config.checkpoint.every} steps; {args.rounds} rounds")
    for clock, name in enumerate(("wall-clock time", "processor time")):
        pairs = [(saved[clock], plain[clock]) for saved, plain in zip(taken[True], taken[False], strict=True)]
        step = statistics.median(plain for _, plain in pairs) / args.block
        shares = [(saved - plain) / (config.checkpoint.every * step) for saved, plain in pairs]
        low, middle, high = statistics.quantiles(shares, n=4)
        ratios = statistics.quantiles([saved / plain for saved, plain in pairs], n=4)
        print(
            f"{name}: {step:.3f} s per step; a block with a save takes {ratios[1]:.3f} times a block without "
            f"({ratios[0]:.3f}-{ratios[2]:.3f}); share of checkpointing {middle:.2%} ({low:.2%} to {high:.2%})"
        )


def measure_restart(args: argparse.Namespace, folder: Path) -> None:
    """Print the time from a kill to the next step."""
    run = folder / "run"
    command = [sys.executable, "-m", "slm_jax.train", "--config", args.config, "--run", str(run)]
    command += ["--checkpoint.every", "5", "--eval.every", "100000", "--train.steps", "100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    wall_seconds, processor_seconds = [], []
    for kill in range(args.kills + 1):  # the first start fills the caches and is not measured
        rows = count_rows(run)
        saved = sorted(int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()) or [0]
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        has_begun = False
        while process.poll() is None:
            now = count_rows(run)
            has_begun |= now < rows or now == 0  # the rows after the checkpoint were dropped
            if (has_begun or rows == saved[-1]) and now > saved[-1]:
                break
            time.sleep(0.02)
        if process.poll() is not None:
            raise SystemExit(process.stderr.read().decode())
        if kill:
            wall_seconds.append(time.perf_counter() - begin)
            processor_seconds.append(cpu_seconds(process.pid))
        goal = now + 8  # past the next checkpoint
        while count_rows(run) < goal:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    print(f"from SIGKILL to the next step: {spread(wall_seconds)} s, processor time {spread(processor_seconds)} s")
    shutil.rmtree(run)


def count_rows(run: Path) -> int:
    """Return the number of rows in metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> str:
    """Format the median and all sorted values."""
    return f"{statistics.median(values):.1f} ({json.dumps([round(v, 1) for v in sorted(values)])})"


if __name__ == "__main__":
    main()
