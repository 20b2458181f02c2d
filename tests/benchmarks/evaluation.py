"""Speed of batched evaluation compared with scoring one sentence at a time.

    python tests/benchmarks/evaluation.py --run RUN --blimp FILE --lambada FILE [--items 60] [--rounds 3]

The files are JSONL with the columns of nyu-mll/blimp and EleutherAI/lambada_openai, and may be compressed; the run may
have any model.

Baselines, both on the same device and in the same precision, score each sentence separately without padding, and read
its result before the next one starts:
  compiled   a jitted forward pass to the log-probabilities of the sentence's tokens, compiled once for each length
  eager      the same without compilation, as in a simple script
Each round runs our scorer on all items and a baseline on a random sample of them; the time per item is compared. The
first table excludes compilation on both sides. The second includes it on both, for all lengths in a file (compiled
baseline only).
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
from slm_jax.evaluation.encoding import continuation_items, sentence_items  # noqa: E402
from slm_jax.evaluation.registry import TASKS  # noqa: E402
from slm_jax.evaluation.scoring import Item, Scorer  # noqa: E402
from slm_jax.run.load import LoadedRun, load_run  # noqa: E402
from slm_jax.utils.process import tune_process  # noqa: E402

TARGET = 20.0
ScoreOne = Callable[[Item], float]
"""Returns the log-probability of one item."""


def items_of(name: str, path: str, loaded: LoadedRun) -> list[Item]:
    """Return the items that a task scores."""
    records = read_files(path, TASKS[name].columns).records
    if name == "blimp":
        return sentence_items(
            loaded.tokenizer, [record[k] for record in records for k in ("sentence_good", "sentence_bad")]
        )
    parts = [record["text"].rstrip().rpartition(" ") for record in records]
    pairs = [(context, space + word) for context, space, word in parts]
    items = continuation_items(loaded.tokenizer, pairs).items
    return [Item(ids[-loaded.context - 1 :], first - max(0, len(ids) - loaded.context - 1)) for ids, first in items]


def baseline(loaded: LoadedRun, compiled: bool) -> ScoreOne:
    """Return a function that scores one item."""
    graph, params = nnx.split(loaded.model, nnx.Param)

    def logprobs(params, ids_1xT, labels_T):
        logits_TxV = nnx.merge(graph, params)(ids_1xT)[0]
        return jnp.take_along_axis(jax.nn.log_softmax(logits_TxV), labels_T[:, None], axis=1)[:, 0]

    forward = jax.jit(logprobs) if compiled else logprobs

    def score_one(item: Item) -> float:
        result = forward(params, jnp.asarray(item.ids[None, :-1]), jnp.asarray(item.ids[1:]))
        return float(np.asarray(result, np.float64)[item.first - 1 :].sum())

    return score_one


def timed(work: Callable[[], object]) -> np.ndarray:
    """Return the wall time and the processor time of a call in seconds."""
    start = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - start


def spread(ratios: np.ndarray) -> str:
    """Format as median (minimum-maximum)."""
    return f"{np.median(ratios):.1f} ({ratios.min():.1f}-{ratios.max():.1f})"


def without_compilation(name: str, items: list[Item], loaded: LoadedRun, args: argparse.Namespace) -> None:
    """Print a row for each baseline."""
    scorer = Scorer(loaded.model, loaded.context, batch_tokens=args.batch_tokens)
    totals = [scores.total for scores in scorer.score(items)]
    rng = np.random.default_rng(0)
    for kind, count in (("compiled", args.items), ("eager", max(3, args.items // 10))):
        chosen = rng.permutation(len(items))[:count]
        score_one = baseline(loaded, kind == "compiled")
        expected = [score_one(items[i]) for i in chosen]  # compiles every length
        worst = max(abs(expected[k] - totals[i]) / abs(totals[i]) for k, i in enumerate(chosen))
        times = []
        for _ in range(args.rounds):
            ours = timed(lambda: scorer.score(items)) / len(items)
            theirs = timed(lambda f=score_one, chosen=chosen: [f(items[i]) for i in chosen]) / len(chosen)
            times.append((ours, theirs))
        pairs = np.array(times)  # [rounds, (ours, theirs), (wall, processor)]
        our_ms, their_ms = 1e3 * np.median(pairs, axis=0)[:, 0]
        wall, processor = (spread(pairs[:, 1, i] / pairs[:, 0, i]) for i in (0, 1))
        print(
            f"| {name} | {len(items)} | {our_ms:.3f} | {kind} | {their_ms:.2f} | {wall} | {processor} | "
            f">= {TARGET:g} | {worst:.0e} |",
            flush=True,
        )


def with_compilation(name: str, items: list[Item], loaded: LoadedRun, args: argparse.Namespace) -> None:
    """Print a row for a complete file, starting with an empty compilation cache."""
    jax.clear_caches()
    scorer = Scorer(loaded.model, loaded.context, batch_tokens=args.batch_tokens)
    ours = timed(lambda: scorer.score(items))[0]
    jax.clear_caches()
    score_one = baseline(loaded, compiled=True)
    theirs = timed(lambda: [score_one(item) for item in items])[0]
    print(f"| {name} | {len(items)} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.1f} |", flush=True)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="The run directory; default: the newest in runs/.")
    parser.add_argument("--blimp", help="Minimal pairs.")
    parser.add_argument("--lambada", help="Passages.")
    parser.add_argument("--items", type=int, default=60, help="Items that a baseline scores per round.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--batch_tokens", type=int, default=0, help="Tokens per batch of our scorer; 0: a default for the device."
    )
    parser.add_argument("--compiling", action="store_true", help="Print the second table too; takes minutes.")
    args = parser.parse_args()
    if not (args.blimp or args.lambada):
        parser.error("give --blimp FILE, --lambada FILE or both")
    return args


def main() -> None:
    """Measure and print the tables."""
    args = arguments()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # an empty compilation cache
        tune_process()
        loaded = load_run(args.run)
        print(
            f"{loaded.run.path}: {loaded.config.model.dim} x {loaded.config.model.depth}, "
            f"{loaded.model.vocab_size} ids, {loaded.model.dtype} on "
            f"{jax.devices()[0].device_kind}, context {loaded.context}"
        )
        given = [(name, path) for name, path in (("blimp", args.blimp), ("lambada", args.lambada)) if path]
        sets = [(name, items_of(name, path, loaded)) for name, path in given]
        titles = (
            "data set, items, ours (ms per item), baseline, ms per item, ratio of wall time, of processor time, target"
        )
        print(f"| {' | '.join(titles.split(', '))} | largest relative difference |")
        print("|" + "---|" * 9)
        for name, items in sets:
            without_compilation(name, items, loaded, args)
        if args.compiling:
            jax.config.update("jax_enable_compilation_cache", False)
            print("\n| data set | items | ours with compilation, s | baseline compiled for each length, s | ratio |")
            print("|" + "---|" * 5)
            for name, items in sets:
                with_compilation(name, items, loaded, args)


if __name__ == "__main__":
    main()
