"""What checkpoints cost, and how soon a killed run goes on: python tests/benchmarks/checkpoint.py [--config NAME]

share   In one process, blocks of steps with one save (until it is whole on disk) and without take turns; what a save
        adds to its block, as a share of the steps between two saves of that config (checkpoint.every).
        Aimed at: 2 % or less.
return  The training command is killed by SIGKILL and given again, programs and text in their caches: seconds until it
        has taken a step. Aimed at: 20 s or less on two cores.

Medians with quartiles. On a machine that others use as well, a block's processor time stands beside its clock.
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
# Not the folder of this file, which holds names of other modules (tokenizer.py).
sys.path[0] = str(ROOT)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart", help="a preset, or a TOML file")
    parser.add_argument("--rounds", type=int, default=8, help="blocks of each kind")
    parser.add_argument("--block", type=int, default=8, help="steps of a block")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--only", choices=["share", "return"])
    args = parser.parse_args()
    from slm_jax.utils.process import tune_process

    tune_process()
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "return":
            measure_share(args, Path(folder) / "share")
        if args.only != "share":
            measure_return(args, Path(folder))


def measure_share(args: argparse.Namespace, folder: Path) -> None:
    """Prints the share of the time that saving takes."""
    import jax
    import numpy as np

    from slm_jax.config.schema import Config
    from slm_jax.run.checkpoint import Checkpoints
    from slm_jax.training.train_step import make_steps

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

        for number in range(-1, args.rounds):  # the first round compiles, and is left out
            if number == 0:
                taken.clear()
            for saves in (True, False) if number % 2 else (False, True):
                block(number + 2, saves)
    print(f"{args.config}: {size:.0f} MB a checkpoint, one in {config.checkpoint.every} steps; {args.rounds} rounds")
    for which, name in enumerate(("clock", "processor time")):
        each = [(w[which], o[which]) for w, o in zip(taken[True], taken[False], strict=True)]
        step = statistics.median(o for _, o in each) / args.block
        shares = [(w - o) / (config.checkpoint.every * step) for w, o in each]
        low, middle, high = statistics.quantiles(shares, n=4)
        ratios = statistics.quantiles([w / o for w, o in each], n=4)
        print(
            f"{name}: a step {step:.3f} s; a block with a save takes {ratios[1]:.3f} ({ratios[0]:.3f}-{ratios[2]:.3f}) "
            f"times one without; share of checkpointing {middle:.2%} ({low:.2%} to {high:.2%})"
        )


def measure_return(args: argparse.Namespace, folder: Path) -> None:
    """Prints the time from a kill to the next step."""
    run = folder / "run"
    command = [sys.executable, "-m", "slm_jax.train", "--config", args.config, "--run", str(run)]
    command += ["--checkpoint.every", "5", "--eval.every", "100000", "--train.steps", "100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    clocks, works = [], []
    for kill in range(args.kills + 1):  # the first one fills the caches
        rows = count_rows(run)
        saved = sorted(int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()) or [0]
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        has_begun = False
        while process.poll() is None:
            now = count_rows(run)
            has_begun |= now < rows or now == 0  # it has dropped the rows after its checkpoint
            if (has_begun or rows == saved[-1]) and now > saved[-1]:
                break
            time.sleep(0.02)
        if process.poll() is not None:
            raise SystemExit(process.stderr.read().decode())
        if kill:
            clocks.append(time.perf_counter() - begin)
            works.append(cpu_seconds(process.pid))
        goal = now + 8  # beyond a checkpoint, and past it
        while count_rows(run) < goal:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    print(f"from SIGKILL to the next step: {spread(clocks)} s by the clock, {spread(works)} s of processor time")
    shutil.rmtree(run)


def count_rows(run: Path) -> int:
    """Rows of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def cpu_seconds(pid: int) -> float:
    """What a process has had of the processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.1f} ({json.dumps([round(v, 1) for v in sorted(values)])})"


if __name__ == "__main__":
    main()
