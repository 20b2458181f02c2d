"""Evaluation against a loop of one sentence at a time: python tests/benchmarks/evaluation.py --run RUN --blimp FILE
--lambada FILE [--items 60] [--rounds 3]

The files are JSONL with the columns of nyu-mll/blimp and EleutherAI/lambada_openai, also packed; a run of any model.

Rivals, both on the same device and in the same precision, each sentence alone, without padding, its result read before
the next begins:
  compiled   a jitted forward pass to the log-probabilities of the sentence's own tokens; it is compiled once for each
             length, which its second figure leaves out
  eager      the same, not compiled: what a first script does
Ours and a rival run in turn within each round, ours on all items, the rival on some drawn from all; what is compared is
the time of one item. The first table leaves out compiling on both sides, the second counts it on both (all of a file's
lengths; the compiled rival only).
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

import jax  # noqa: E402  # after the path is set
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from slm_jax.evaluation.datasets import read_files  # noqa: E402
from slm_jax.evaluation.encoding import continuations, sentences  # noqa: E402
from slm_jax.evaluation.registry import TASKS  # noqa: E402
from slm_jax.evaluation.scoring import Item, Scorer  # noqa: E402
from slm_jax.run.load import LoadedRun, load_run  # noqa: E402
from slm_jax.utils.process import tune_process  # noqa: E402

TARGET = 20.0
Alone = Callable[[Item], float]
"""The log-probability of one item."""


def items_of(name: str, path: str, loaded: LoadedRun) -> list[Item]:
    """What a task scores."""
    rows = read_files(path, TASKS[name].columns).rows
    if name == "blimp":
        return sentences(loaded.tokenizer, [row[k] for row in rows for k in ("sentence_good", "sentence_bad")])
    parts = [row["text"].rstrip().rpartition(" ") for row in rows]
    found = continuations(loaded.tokenizer, [(context, space + word) for context, space, word in parts]).items
    return [Item(ids[-loaded.context - 1 :], first - max(0, len(ids) - loaded.context - 1)) for ids, first in found]


def one_at_a_time(loaded: LoadedRun, compiled: bool) -> Alone:
    """The rival: each item by itself."""
    graph, params = nnx.split(loaded.model, nnx.Param)

    def logprobs(params, ids_1xT, labels_T):
        logits_TxV = nnx.merge(graph, params)(ids_1xT)[0]
        return jnp.take_along_axis(jax.nn.log_softmax(logits_TxV), labels_T[:, None], axis=1)[:, 0]

    forward = jax.jit(logprobs) if compiled else logprobs

    def alone(item: Item) -> float:
        found = forward(params, jnp.asarray(item.ids[None, :-1]), jnp.asarray(item.ids[1:]))
        return float(np.asarray(found, np.float64)[item.first - 1 :].sum())

    return alone


def timed(work: Callable[[], object]) -> np.ndarray:
    """Seconds by the clock, and of the processor."""
    start = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - start


def spread(ratios: np.ndarray) -> str:
    """Median (least-largest)."""
    return f"{np.median(ratios):.1f} ({ratios.min():.1f}-{ratios.max():.1f})"


def without_compiling(name: str, items: list[Item], loaded: LoadedRun, args: argparse.Namespace) -> None:
    """A line for each rival."""
    scorer = Scorer(loaded.model, loaded.context, batch_tokens=args.batch_tokens)
    totals = [scores.total for scores in scorer.score(items)]
    rng = np.random.default_rng(0)
    for rival, count in (("compiled", args.items), ("eager", max(3, args.items // 10))):
        chosen = rng.permutation(len(items))[:count]
        alone = one_at_a_time(loaded, rival == "compiled")
        again = [alone(items[i]) for i in chosen]  # and every length of them is compiled
        worst = max(abs(again[k] - totals[i]) / abs(totals[i]) for k, i in enumerate(chosen))
        times = []
        for _ in range(args.rounds):
            ours = timed(lambda: scorer.score(items)) / len(items)
            its = timed(lambda alone=alone, chosen=chosen: [alone(items[i]) for i in chosen]) / len(chosen)
            times.append((ours, its))
        pairs = np.array(times)  # [rounds, (ours, its), (clock, processor)]
        mine, other = 1e3 * np.median(pairs, axis=0)[:, 0]
        clock, processor = (spread(pairs[:, 1, i] / pairs[:, 0, i]) for i in (0, 1))
        print(
            f"| {name} | {len(items)} | {mine:.3f} | {rival} | {other:.2f} | {clock} | {processor} | >= {TARGET:g} | "
            f"{worst:.0e} |",
            flush=True,
        )


def with_compiling(name: str, items: list[Item], loaded: LoadedRun, args: argparse.Namespace) -> None:
    """One line: the whole file, from nothing compiled."""
    jax.clear_caches()
    scorer = Scorer(loaded.model, loaded.context, batch_tokens=args.batch_tokens)
    ours = timed(lambda: scorer.score(items))[0]
    jax.clear_caches()
    alone = one_at_a_time(loaded, compiled=True)
    its = timed(lambda: [alone(item) for item in items])[0]
    print(f"| {name} | {len(items)} | {ours:.1f} | {its:.1f} | {its / ours:.1f} |", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="The run; default: the newest in runs/.")
    parser.add_argument("--blimp", help="Minimal pairs.")
    parser.add_argument("--lambada", help="Passages.")
    parser.add_argument("--items", type=int, default=60, help="Sentences that the rivals score in a round.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_tokens", type=int, default=0, help="Ours; 0: as suits the device.")
    parser.add_argument("--compiling", action="store_true", help="The second table too: minutes.")
    args = parser.parse_args()
    if not (args.blimp or args.lambada):
        parser.error("give --blimp FILE, --lambada FILE or both")
    return args


def main() -> None:
    """Measure and print."""
    args = arguments()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # nothing is found compiled
        tune_process()
        loaded = load_run(args.run)
        print(
            f"{loaded.run.path}: {loaded.config.model.dim} x {loaded.config.model.depth}, "
            f"{loaded.model.vocab_size} ids, {loaded.model.dtype} on "
            f"{jax.devices()[0].device_kind}, context {loaded.context}"
        )
        given = [(name, path) for name, path in (("blimp", args.blimp), ("lambada", args.lambada)) if path]
        sets = [(name, items_of(name, path, loaded)) for name, path in given]
        titles = "set, items, ours (ms an item), one at a time, its, ratio by the clock, of processor time, target"
        print(f"| {' | '.join(titles.split(', '))} | largest relative difference |")
        print("|" + "---|" * 9)
        for name, items in sets:
            without_compiling(name, items, loaded, args)
        if args.compiling:
            jax.config.update("jax_enable_compilation_cache", False)
            print("\n| set | items | ours with compiling, s | one at a time, compiled for each length, s | ratio |")
            print("|" + "---|" * 5)
            for name, items in sets:
                with_compiling(name, items, loaded, args)


if __name__ == "__main__":
    main()
