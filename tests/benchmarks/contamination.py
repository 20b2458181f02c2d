"""Measure the search for evaluation items in training text: python tests/benchmarks/contamination.py TEXT [TEXT …]

Items are passages of the text, and the words of others in another order. The search is timed alone, and with the
decoding of a corpus that is encoded with a tokenizer learned from the beginning of the text. Times are processor
seconds, as medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from slm_jax.evaluation.contamination import NgramIndex  # noqa: E402  # after the path is set
from tokenizer import HybridTokenizer  # noqa: E402

_BLOCK = 1_000_000  # characters
_LEARNED = 2_000_000  # characters that the tokenizer is learned from


def main() -> None:
    """Print MB of UTF-8 text per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="UTF-8 text files")
    parser.add_argument("--items", type=int, default=10_000, help="number of evaluation items")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    text = "\n".join(path.read_text(encoding="utf-8") for path in options.texts)
    blocks = [text[start : start + _BLOCK] for start in range(0, len(text), _BLOCK)]
    megabytes = len(text.encode()) / 1e6
    words = text.split()
    random = np.random.default_rng(0)
    items = []
    for start in random.integers(0, max(len(words) - 60, 1), options.items):
        passage = words[start : start + 60]
        items.append((" ".join(passage if start % 2 else random.permutation(passage)),))
    tokenizer = HybridTokenizer()
    tokenizer.add_text(text[:_LEARNED])
    tokenizer.freeze_vocab(vocab_size=8192)
    encoded = tokenizer.encode_arrays(blocks)

    def search(texts: list[str]) -> None:
        index = NgramIndex([items])
        for each in texts:
            index.search([each])
        found = index.results()[0].found
        print(f"  {found.mean():.1%} of {found.size:,} items found")

    for name, run in (
        ("search", lambda: search(blocks)),
        ("decoding and search", lambda: search([tokenizer.decode(ids.tolist()) for ids in encoded])),
    ):
        seconds = [measure(run) for _ in range(options.rounds)]
        print(f"{name}: {megabytes / statistics.median(seconds):.1f} MB/s ({megabytes:.0f} MB of text)")


def measure(run: Callable[[], None]) -> float:
    """Return the processor seconds of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
