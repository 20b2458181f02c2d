"""Speed against tiktoken by kind of text: python tests/benchmarks/tokenizer_speed.py FOLDER [--size 16384] [--rounds 5]

Learns a portable tokenizer, one with case marks and a Hugging Face BPE, whose merges tiktoken uses, from the training
text of a folder (as `tokenizer.py` here splits it), and encodes the held-out text of each group of files: fresh, with
an empty cache; again, with all of it in the cache; then decodes a list and an array. Everything runs in one thread, in
turn within each round. The table has the ratio of tiktoken's processor time to this tokenizer's (above 1: faster) as
the median over the rounds with the quartiles, and the geometric mean of the groups. Requires tokenizers and tiktoken.

    python tests/benchmarks/tokenizer_speed.py FOLDER --groups English=english*,stories code=code Hebrew=hebrew
"""

from __future__ import annotations

import argparse
import statistics
import sys
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
sys.path[0] = str(ROOT)

from tests.benchmarks.tokenizer import megabytes, read_folder, seconds, with_empty_cache  # noqa: E402
from tokenizer import HybridTokenizer  # noqa: E402
from tokenizer.inspect import baselines  # noqa: E402
from tokenizer.inspect.baselines import Baseline  # noqa: E402

QUANTITIES = ("fresh", "again", "list", "array")
GROUPS = ["English=english*,stories,shakespeare", "code=code", "Hebrew=hebrew", "20 languages=multilingual"]


def ratios(own: HybridTokenizer, rival: Baseline, text: str, rounds: int) -> dict[str, list[float]]:
    """Return, for each quantity and round, the processor time of the rival divided by that of this tokenizer."""
    warm = with_empty_cache(own)
    array = warm.encode_array(text)
    ids = array.tolist()
    rival_ids = rival.encode(text).tolist()
    assert warm.decode(ids) == text
    result: dict[str, list[float]] = {quantity: [] for quantity in QUANTITIES}
    for _ in range(rounds):
        fresh = with_empty_cache(own)
        encode = seconds(lambda: rival.encode(text))
        result["fresh"].append(encode / seconds(lambda: fresh.encode_array(text)))  # noqa: B023  # called at once
        result["again"].append(encode / seconds(lambda: warm.encode_array(text)))
        decode = seconds(lambda: rival.decode(rival_ids))
        result["list"].append(decode / seconds(lambda: warm.decode(ids)))
        result["array"].append(decode / seconds(lambda: warm.decode(array)))
    return result


def spread(values: list[float]) -> str:
    """Return the median with the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def learn(texts: list[str], size: int, portable: bool) -> HybridTokenizer:
    """Return a tokenizer of one kind."""
    tokenizer = HybridTokenizer(portable=portable)
    for text in texts:
        tokenizer.add_text(text)
    tokenizer.freeze_vocab(vocab_size=size)
    return tokenizer


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with .txt files")
    parser.add_argument("--size", type=int, default=16384, help="vocabulary size (default: 16384)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per measurement (default: 5)")
    parser.add_argument(
        "--groups", nargs="+", default=GROUPS, metavar="NAME=PATTERN,PATTERN", help="files, without .txt, of each row"
    )
    args = parser.parse_args()
    corpus = read_folder(args.folder, [], [])
    texts = list(corpus.training.values())
    print(f"{megabytes(corpus.training):.1f} MB of training text, {args.size} ids", flush=True)
    rival = baselines.tiktoken_from(baselines.train_hugging_face(texts, args.size))
    print(f"| tokenizer | text | MB | {' | '.join(QUANTITIES)} |\n|{'---|' * (3 + len(QUANTITIES))}")
    for kind, portable in (("portable", True), ("case marks", False)):
        own = learn(texts, args.size, portable)
        medians: dict[str, list[float]] = {quantity: [] for quantity in QUANTITIES}
        for group in args.groups:
            name, _, patterns = group.partition("=")
            chosen = [key for key in corpus.held_out if any(fnmatch(key, each) for each in patterns.split(","))]
            if not chosen:
                continue
            text = "".join(corpus.held_out[key] for key in chosen)
            measured = ratios(own, rival, text, args.rounds)
            for quantity, values in measured.items():
                medians[quantity].append(statistics.median(values))
            cells = " | ".join(map(spread, measured.values()))
            print(f"| {kind} | {name} | {len(text.encode()) / 1e6:.1f} | {cells} |", flush=True)
        means = " | ".join(f"**{statistics.geometric_mean(values):.2f}**" for values in medians.values())
        print(f"| {kind} | geometric mean | | {means} |", flush=True)


if __name__ == "__main__":
    main()
