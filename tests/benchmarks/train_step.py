"""Speed of the training step against PyTorch: python tests/benchmarks/train_step.py [--shapes S M] [--rounds 5]

Each row of the table is a process of its own, configured as users configure it (slm_jax like its command, PyTorch with
its defaults). All take turns in every round. The result is the ratio of times within a round, its median and quartiles
over the rounds, in wall-clock and in processor time (more reliable on a shared machine, but it includes threads that
spin). Both sides train the same model on the same batch with the same loss terms, clipping and AdamW, on all cores.
PyTorch uses fused attention, loss and AdamW; "fp32" rows multiply in float32, "bf16" rows under autocast to bfloat16.
The row `ours` multiplies in what `train.dtype` auto chooses, bfloat16 where the processor multiplies it faster; the
output says which. Parameters are float32 on both sides. `dense` is the unlikelihood term as its authors published it;
the other rows gather only the probabilities that it needs.

    --only ROW …      rows in addition to `ours` (a part of the name suffices)
    --terms plain ul  without, with the unlikelihood term
    --cores 1         on a shared machine: with one thread per row, processor time approximates an idle machine
    --memory          temporary memory of the compiled step instead of time
    --first-step      seconds from the start of a process to its first step, compilation cache empty and filled

Needs the extra `bench`. On a shared machine use the ratios, not the tokens/s.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
sys.path[0] = str(ROOT)

VOCAB = 8192
BATCH = 16
LENGTH = 256
SHAPES = {
    "S": {"model.dim": 256, "model.depth": 4, "model.heads": 8, "model.mlp_dim": 1024},
    "M": {"model.dim": 512, "model.depth": 6, "model.heads": 8, "model.mlp_dim": 2048},
}
COMMON = {
    "train.batch_size": BATCH,
    "train.sequence_length": LENGTH,
    "optimizer.name": "adamw",
    "optimizer.lr": 3e-4,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
}
OURS = {
    "ours": {},
    "ours, Muon": {"optimizer.name": "muon"},
    "ours, fp32": {"train.dtype": "float32"},
    "ours, bf16": {"train.dtype": "bfloat16"},
    "ours, scan + remat": {"model.scan_layers": True, "model.remat": "full"},
    "naive JAX fp32": {"train.dtype": "float32", "model.attention": "naive"},
}
TORCH = {
    "torch eager fp32": {},
    "torch eager fp32, dense": {"dense": True},
    "torch eager bf16": {"bf16": True},
    "torch compile fp32": {"compile": True},
    "torch compile bf16": {"compile": True, "bf16": True},
    "torch compile bf16, dense": {"compile": True, "bf16": True, "dense": True},
}
# (row, terms, shape): target of the speedup over that row
TARGETS = {
    ("torch eager fp32", "ul", "S"): 4.0,
    ("torch eager fp32", "ul", "M"): 3.5,
    ("torch eager fp32", "plain", "S"): 2.8,
    ("torch eager fp32", "plain", "M"): 2.8,
    ("torch compile bf16", "ul", "S"): 1.6,
    ("torch compile bf16", "plain", "S"): 1.6,
    ("torch compile bf16", "ul", "M"): 1.15,
    ("torch compile bf16", "plain", "M"): 1.15,
}
UL_ALPHA = 0.1


def make_batch() -> dict[str, Any]:
    """Return input_ids and labels int32 [B, T], with frequencies of about 1 / rank as in text."""
    import numpy as np

    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, VOCAB + 1)
    tokens = rng.choice(VOCAB, (BATCH, LENGTH + 1), p=weights / weights.sum()).astype(np.int32)
    return {"input_ids": tokens[:, :-1].copy(), "labels": tokens[:, 1:].copy()}


def make_config(row: str, shape: str, terms: str) -> Any:
    """Return the config of a row."""
    from slm_jax.config.schema import Config

    alpha = UL_ALPHA if terms == "ul" else 0.0
    return Config.load(**COMMON | SHAPES[shape] | {"train.ul_alpha": alpha} | OURS.get(row, {}))


def our_steps(row: str, shape: str, terms: str) -> Any:
    """Return the compiled functions of slm_jax; the naive row computes full logits and plain float32 products."""
    from slm_jax.model import ops
    from slm_jax.training.steps import make_steps

    if row.startswith("naive"):
        ops.cross_entropy = ops.naive_cross_entropy
    return make_steps(make_config(row, shape, terms), VOCAB)


def make_weights(shapes: Any) -> Any:
    """Return the same weights for every row: normal(0, 0.02), norm scales 1."""
    import jax
    import numpy as np

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        name = jax.tree_util.keystr(path).encode()
        return np.random.default_rng(list(name)).normal(0, 0.02, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def our_step(row: str, shape: str, terms: str, same_weights: bool = True) -> Callable[[int], float]:
    """Return a function that takes `count` steps of slm_jax and returns the loss."""
    import jax

    from slm_jax.utils.process import tune_process

    tune_process()
    steps = our_steps(row, shape, terms)
    batch = jax.device_put(make_batch())
    state = steps.init()
    if same_weights:
        state = state._replace(params=jax.device_put(make_weights(state.params)))

    def run(count: int) -> float:
        nonlocal state
        for _ in range(count):
            state, metrics = steps.train(state, batch)
        return float(metrics["loss"])

    return run


def torch_step(row: str, shape: str, terms: str) -> Callable[[int], float]:
    """Return a function that takes `count` steps of the PyTorch twin and returns the loss."""
    import jax
    import torch

    from tests.model import torch_twin

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    options = TORCH[row]
    config = make_config(row, shape, terms)
    model = torch_twin.TorchTransformer(config.model, VOCAB)
    torch_twin.load_weights(model, make_weights(jax.eval_shape(our_steps(row, shape, terms).init).params))
    batch = {name: torch.from_numpy(value).long() for name, value in make_batch().items()}
    optimizer = torch_twin.make_adamw(model, config.optimizer, fused=True)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids)
        if options.get("dense") and terms == "ul":
            return dense_loss(logits, batch, UL_ALPHA)
        return torch_twin.mean_loss(logits, batch, 0.0, UL_ALPHA if terms == "ul" else 0.0)

    compiled = torch.compile(loss_of) if options.get("compile") else loss_of

    def run(count: int) -> float:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=options.get("bf16", False)):
                loss = compiled(batch["input_ids"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            optimizer.step()
        return loss.item()

    return run


def dense_loss(logits: Any, batch: dict[str, Any], ul_alpha: float) -> Any:
    """Return the loss with a mask over the vocabulary, as in the code published with arXiv:1908.04319."""
    import torch

    ids = batch["input_ids"]
    labels = batch["labels"]
    log_p_BxTxV = logits.float().log_softmax(-1)
    earlier_TxS = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    # Tokens that are no candidates are scattered to the label, which is then cleared.
    index_BxTxS = torch.where(earlier_TxS, ids[:, None, :], labels[:, :, None])
    negative_BxTxV = torch.zeros_like(log_p_BxTxV).scatter_(2, index_BxTxS, 1.0).scatter_(2, labels[:, :, None], 0.0)
    complement_BxTxV = (1.0 - log_p_BxTxV.exp()).clamp(min=1e-5)
    nll = torch.nn.functional.nll_loss(log_p_BxTxV.flatten(0, 1), labels.flatten())
    return nll - ul_alpha * (complement_BxTxV.log() * negative_BxTxV).sum() / labels.numel()


def worker(row: str, shape: str, terms: str) -> None:
    """Take two steps to compile and print their losses, then `count` steps for each line of standard input.

    Each line is answered with seconds of wall-clock and of processor time.
    """
    run = (torch_step if row in TORCH else our_step)(row, shape, terms)
    print(json.dumps([run(1), run(1)]), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        used = time.process_time()
        run(int(line))
        print(json.dumps([time.perf_counter() - start, time.process_time() - used]), flush=True)


def memory_worker(row: str, shape: str, terms: str) -> None:
    """Print the bytes of temporary memory of the compiled step."""
    import jax

    steps = our_steps(row, shape, terms)
    compiled = steps.train.lower(jax.eval_shape(steps.init), make_batch()).compile()
    print(compiled.memory_analysis().temp_size_in_bytes)


def first_step_worker(row: str, shape: str, terms: str) -> None:
    """Take one step, after the imports of the command."""
    from slm_jax.training import loop  # noqa: F401

    our_step(row, shape, terms, same_weights=False)(1)
    print("done", flush=True)


WORKERS = {"time": worker, "memory": memory_worker, "first-step": first_step_worker}


@dataclass
class Process:
    """The process of a row."""

    name: str
    handle: subprocess.Popen[str]
    losses: list[float]

    @classmethod
    def start(cls, name: str, shape: str, terms: str) -> Process:
        handle = spawn("time", name, shape, terms)
        return cls(name, handle, json.loads(read_line(handle)))

    def seconds(self, steps: int) -> list[float]:
        """Return the seconds of wall-clock and of processor time of `steps` steps."""
        assert self.handle.stdin is not None
        self.handle.stdin.write(f"{steps}\n")
        self.handle.stdin.flush()
        return json.loads(read_line(self.handle))

    def stop(self) -> None:
        assert self.handle.stdin is not None
        self.handle.stdin.close()
        self.handle.wait()


def spawn(kind: str, row: str, shape: str, terms: str, **environment: str) -> subprocess.Popen[str]:
    """Start the process of a row."""
    command = [sys.executable, __file__, "--worker", kind, row, shape, terms]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def read_line(handle: subprocess.Popen[str]) -> str:
    """Return the next line of a process's output."""
    assert handle.stdout is not None
    line = handle.stdout.readline()
    if not line:
        raise SystemExit(f"{' '.join(map(str, handle.args))} ended with status {handle.wait()}")  # type: ignore
    return line


def quartiles(values: list[float]) -> str:
    """Return `median (lower quartile-upper quartile)`."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def measure_speed(rows: list[str], shape: str, terms: str, rounds: int, steps: int) -> None:
    """Print the speedup of `ours` over each row."""
    processes = []
    try:
        for row in rows:
            processes.append(Process.start(row, shape, terms))
            first = ", ".join(f"{loss:.4f}" for loss in processes[-1].losses)
            print(f"  {row}: ready, first losses {first}", file=sys.stderr, flush=True)
        times: dict[str, list[list[float]]] = {row: [] for row in rows}
        for i in range(rounds):
            for process in processes[i % len(rows) :] + processes[: i % len(rows)]:
                times[process.name].append(process.seconds(steps))
    finally:
        for process in processes:
            process.stop()
    print(f"\n{shape}, {terms}: {rounds} rounds of {steps} steps; {precisions()}")
    print(f"{'time / ours, median (quartiles)':32}{'clock':>18}{'processors':>20}{'target':>9}{'':14}{'tokens/s':>9}")
    for row in rows:
        clock, used = (
            [theirs[i] / mine[i] for theirs, mine in zip(times[row], times["ours"], strict=True)] for i in (0, 1)
        )
        target = TARGETS.get((row, terms, shape))
        verdict = ""
        goal = ""
        if target is not None:
            verdict = "reached" if statistics.median(clock) >= target else "NOT reached"
            goal = f">= {target:.2f}"
        rate = BATCH * LENGTH * steps / statistics.median(both[0] for both in times[row])
        print(f"{row:28}{quartiles(clock):>22}{quartiles(used):>20}{goal:>9}  {verdict:12}{rate:9,.0f}", flush=True)


def precisions() -> str:
    """Return one phrase on the precision of the products of both sides."""
    from slm_jax.model.precision import compute_dtype

    version = importlib.metadata.version("torch") if importlib.util.find_spec("torch") else "not installed"
    return (
        f"ours: {compute_dtype('auto')} products where the row names no precision; PyTorch {version}: float32 "
        "products in fp32 rows, autocast to bfloat16 in bf16 rows"
    )


def measure_memory(shape: str, terms: str) -> None:
    """Print the temporary memory of the compiled steps."""
    sizes = {}
    for row in ("naive JAX fp32", "ours, fp32", "ours", "ours, scan + remat"):
        process = spawn("memory", row, shape, terms)
        sizes[row] = int(read_line(process))
        process.wait()
    print(f"\n{shape}, {terms}: temporary memory of the compiled step")
    naive = sizes["naive JAX fp32"]
    for row, size in sizes.items():
        print(f"{row:28}{size / 2**20:8.0f} MiB   1/{naive / size:.1f} of naive")


def measure_first_step(shape: str, rounds: int) -> None:
    """Print the seconds from the start of a process to the end of its first step."""
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for state in times:
                start = time.perf_counter()
                process = spawn("first-step", "ours", shape, "plain", XDG_CACHE_HOME=cache)
                read_line(process)
                times[state].append(time.perf_counter() - start)
                process.wait()
    for state, target in (("cold", 15.0), ("warm", 3.0)):
        verdict = "reached" if statistics.median(times[state]) <= target else "NOT reached"
        print(f"{shape}: first step, {state} cache: {quartiles(times[state])} s, target <= {target:.0f} s: {verdict}")


def main() -> None:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--worker"]:
        kind, *args = sys.argv[2:]
        return WORKERS[kind](*args)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--terms", nargs="+", choices=["plain", "ul"], default=["plain", "ul"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each row in a round")
    parser.add_argument("--only", nargs="+", metavar="ROW")
    parser.add_argument("--cores", type=int, default=0, help="cores that every row may use; 0: all")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--first-step", action="store_true")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cores :])  # processes inherit it
    for shape in options.shapes:
        if options.first_step:
            measure_first_step(shape, options.rounds)
            continue
        for terms in options.terms:
            if options.memory:
                measure_memory(shape, terms)
                continue
            rows = [row for row in [*OURS, *TORCH] if terms == "ul" or "dense" not in row]
            if options.only:
                rows = [row for row in rows if row == "ours" or any(part in row for part in options.only)]
            measure_speed(rows, shape, terms, options.rounds, options.steps)
    return None


if __name__ == "__main__":
    main()
