"""Compare ways of learning a vocabulary: python tests/benchmarks/tokenizer_quality.py FOLDER [--sizes 8192] [--mb 1.5]

FOLDER contains UTF-8 .txt files, in which a line ``<|endoftext|>`` may end a document. One document in nine, chosen by
the hash of its text, is held out. Printed are the bytes per token on the held-out text: of all of it, and as geometric
mean over the files of the ratio to Hugging Face BPE with the pattern of GPT-4, trained on the same text to the same
size. Requires the package `tokenizers`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# This script's own folder would hide the package: it has a file tokenizer.py.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

from tokenizer import HybridTokenizer  # noqa: E402  # after the path is set
from tokenizer.inspect import baselines  # noqa: E402
from tokenizer.portable import learn as portable_learn  # noqa: E402
from tokenizer.vocabulary import FIRST_LEARNED  # noqa: E402

Texts = dict[str, str]


def read_folder(folder: Path, megabytes: float) -> tuple[Texts, Texts]:
    """Return training text and held-out text by file name; of each file, documents at its beginning."""
    training: Texts = {}
    held_out: Texts = {}
    for path in sorted(folder.glob("*.txt")):
        kept: list[str] = []
        held: list[str] = []
        size = 0
        for document in path.read_bytes().decode("utf-8").split("<|endoftext|>\n"):
            if size > megabytes * 1e6:
                break
            data = document.encode()
            size += len(data)
            (held if hashlib.sha256(data).digest()[0] < 28 else kept).append(document)
        if held and kept:
            training[path.stem] = "".join(kept)
            held_out[path.stem] = "".join(held)
    return training, held_out


def ways(size: int) -> dict[str, dict]:
    """Return the options of each way of learning by name."""
    entries = size - FIRST_LEARNED
    return {
        "portable": {"portable": True},
        "portable, merges only": {"portable": True, "overshoot": 1.0},
        "portable, 20 % common words first": {"portable": True, "k_bases": entries // 5},
        "portable, 50 % common words first": {"portable": True, "k_bases": entries // 2},
        "portable, score freq_pmi": {"portable": True, "score": "freq_pmi"},
        "case marks": {},
        "case marks, score freq_pmi": {"score": "freq_pmi"},
        "case marks, score pmi": {"score": "pmi"},
    }


def train(training: Texts, size: int, portable: bool = False, overshoot: float = 0.0, **options) -> HybridTokenizer:
    """Return a tokenizer that is trained on the text."""
    tokenizer = HybridTokenizer(portable=portable)
    for text in training.values():
        tokenizer.add_text(text)
    before = portable_learn._OVERSHOOT
    try:
        portable_learn._OVERSHOOT = overshoot or before
        tokenizer.freeze_vocab(vocab_size=size, **options)
    finally:
        portable_learn._OVERSHOOT = before
    return tokenizer


def measure(held_out: Texts, count: Callable[[str], int]) -> dict[str, float]:
    """Return the bytes per token of each text."""
    return {name: len(text.encode()) / count(text) for name, text in held_out.items()}


def show(name: str, held_out: Texts, rates: dict[str, float], baseline: dict[str, float], seconds: float) -> None:
    """Print one way."""
    size = {name: len(text.encode()) for name, text in held_out.items()}
    rate = sum(size.values()) / sum(size[file] / rates[file] for file in size)
    ratio = statistics.geometric_mean([rates[file] / baseline[file] for file in size])
    whole = sum(size[file] / baseline[file] for file in size) / sum(size[file] / rates[file] for file in size)
    print(f"| {name} | {rate:.4f} | {whole:.4f} | {ratio:.4f} | {seconds:.1f} |", flush=True)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192])
    parser.add_argument("--mb", type=float, default=1.5, help="MB of each file that are used (default: 1.5)")
    parser.add_argument("--only", default="", help="ways whose name contains this")
    options = parser.parse_args()
    training, held_out = read_folder(options.folder, options.mb)
    sizes = [sum(len(text.encode()) for text in texts.values()) / 1e6 for texts in (training, held_out)]
    print(f"{len(held_out)} files, {sizes[0]:.1f} MB to learn from, {sizes[1]:.1f} MB held out: {', '.join(held_out)}")
    for size in options.sizes:
        print(f"\n| {size} ids | bytes/token | ratio | geometric mean | seconds to learn |\n|---|---|---|---|---|")
        start = time.process_time()
        hugging_face = baselines.train_hugging_face(list(training.values()), size)
        seconds = time.process_time() - start
        baseline = measure(held_out, lambda text: len(hugging_face.encode(text).ids))  # noqa: B023  # used at once
        show("Hugging Face BPE", held_out, baseline, baseline, seconds)
        for name, way in ways(size).items():
            if options.only in name:
                start = time.process_time()
                tokenizer = train(training, size, **way)
                seconds = time.process_time() - start
                show(name, held_out, measure(held_out, tokenizer.count), baseline, seconds)


if __name__ == "__main__":
    main()
