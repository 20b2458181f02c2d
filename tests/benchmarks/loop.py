"""Cost of the training loop: python tests/benchmarks/loop.py [--config NAME] [model.dim=256 …]

Blocks of steps of the training loop (batches, metrics, progress, signals) alternate in one process with blocks that
only call the same compiled step, on one batch and with a state of its own. The result is the ratio of their times in
each pair of blocks, its median and quartiles, in wall-clock and in processor time. Target: at most 1.03.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
sys.path[0] = str(ROOT)


class Finished(Exception):  # noqa: N818
    """All blocks have been measured."""


class AlternatingStep:
    """A compiled step that measures blocks of its calls, and between them blocks of bare calls.

    Attributes:
        loop: Seconds of wall-clock and of processor time of each block in the loop.
        bare: The same of each block of bare calls.
    """

    def __init__(self, step: Callable[..., Any], state: Any, batch: Any, rounds: int, block: int):
        """Take the compiled step, the state and the batch of the bare calls, and the number and size of blocks."""
        self.loop: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self._step = step
        self._state = state
        self._batch = batch
        self._rounds = rounds
        self._block = block
        self._calls = -2  # the first two steps are not measured
        self._began = (0.0, 0.0)

    def __call__(self, state: Any, batch: Any) -> Any:
        """Take a step of the loop; at the end of a block, note its time and measure a bare one."""
        import jax

        if self._calls == self._block:
            jax.block_until_ready(state)
            self.loop.append(since(self._began))
            if len(self.loop) == self._rounds:
                raise Finished
        if self._calls in (0, self._block):
            jax.block_until_ready(state)
            self._measure_bare()
            self._calls = 0
            self._began = now()
        self._calls += 1
        return self._step(state, batch)

    def _measure_bare(self) -> None:
        import jax

        began = now()
        for _ in range(self._block):
            self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        self.bare.append(since(began))


def now() -> tuple[float, float]:
    """Return wall-clock and processor time in seconds."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    """Return the seconds since a moment, of both clocks."""
    clock, used = now()
    return clock - began[0], used - began[1]


def measure(config: Any, folder: Path, rounds: int, block: int) -> AlternatingStep:
    """Train in a folder until all blocks are measured."""
    from slm_jax.run.directory import Run
    from slm_jax.training.loop import run_loop
    from slm_jax.training.setup import compile_session, open_run

    run = Run(folder)
    folder.mkdir()
    run.begin(config)
    with open_run(config, run) as opened:
        session = compile_session(opened)
        ((shape, step),) = session.programs.items()
        batch = session.shard_batch(opened.batches.at(0))
        alternating = AlternatingStep(step, opened.steps.init(), batch, rounds, block)
        session.programs[shape] = alternating
        try:
            run_loop(session)
        except Finished:
            return alternating
    raise SystemExit("the run ended before all blocks were measured: fewer --rounds, or a smaller --block")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart", help="preset or TOML file")
    parser.add_argument("--rounds", type=int, default=12, help="pairs of blocks")
    parser.add_argument("--block", type=int, default=6, help="steps per block")
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="options of the config, such as model.dim=256")
    args = parser.parse_args()
    from slm_jax.config.schema import Config
    from slm_jax.utils.process import tune_process
    from slm_jax.utils.progress import show_log
    from tests.benchmarks.train_step import quartiles

    tune_process()
    show_log()
    never = 10**6  # steps: no validation or save falls between two blocks
    overrides = {"train.steps": never, "eval.every": never, "checkpoint.every": never, "log.every": never}
    config = Config.load(args.config, **overrides | dict(option.split("=", 1) for option in args.options))
    with tempfile.TemporaryDirectory() as folder:
        result = measure(config, Path(folder) / "run", args.rounds, args.block)
    pairs = list(zip(result.loop, result.bare, strict=True))
    milliseconds = sorted(loop[0] for loop in result.loop)[len(result.loop) // 2] / args.block * 1000
    print(f"{args.config}: {milliseconds:.1f} ms a step in the loop, {args.rounds} pairs of {args.block} steps")
    for index, clock in enumerate(("wall-clock", "processor")):
        print(f"loop / bare step, {clock}: {quartiles([loop[index] / bare[index] for loop, bare in pairs])}")


if __name__ == "__main__":
    main()
