"""Measure the tokenizer against its targets: python tests/benchmarks/tokenizer.py FOLDER [--rounds 5] [--sizes 8192]

FOLDER contains UTF-8 .txt files, in which a line ``<|endoftext|>`` may end a document. One document in nine, chosen by
the hash of its text, is held out, and every tokenizer is trained on the rest. Everything runs in one thread; the
baselines and this tokenizer run in turn within each round. Times are processor seconds, as medians over the rounds.
Requires the packages `tokenizers` and `tiktoken`.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# This script's own folder would hide the package: it is named tokenizer.py.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

from tokenizer import HybridTokenizer, pretrained_names  # noqa: E402  # after the path is set
from tokenizer.inspect import baselines  # noqa: E402  # after the path is set
from tokenizer.inspect.baselines import Baseline  # noqa: E402  # after the path is set

FRESH_BYTES = 6_000_000
"""Bytes of text that encoding speed is measured on."""
LARGE = 20_000
"""Vocabulary size from which the targets and phrase shares of large vocabularies apply."""
CONFIGURATIONS = ("words", "spaces", "spaces and phrases")


@dataclass(frozen=True)
class Result:
    """A measured value and its target; `at_most` tells whether smaller is better."""

    name: str
    target: float
    value: float
    at_most: bool = False

    @property
    def is_reached(self) -> bool:
        """Return whether the value reaches the target."""
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass(frozen=True)
class Corpus:
    """Text by file name, and the names that are English."""

    training: dict[str, str]
    held_out: dict[str, str]
    english: list[str]

    @property
    def other(self) -> list[str]:
        """The names that are not English."""
        return [name for name in self.training if name not in self.english]


def read_folder(folder: Path, skip: list[str], english: list[str]) -> Corpus:
    """Read the .txt files of a folder and split each into training text and held-out text."""
    training = {}
    held_out = {}
    for path in sorted(folder.glob("*.txt")):
        if path.stem in skip:
            continue
        kept = []
        held = []
        for document in path.read_bytes().decode("utf-8").split("<|endoftext|>\n"):
            is_held = hashlib.sha256(document.encode()).digest()[0] < 28
            (held if is_held else kept).append(document)
        training[path.stem] = "".join(kept)
        held_out[path.stem] = "".join(held)
    names = [name for name in training if any(fnmatch(name, pattern) for pattern in english)]
    return Corpus(training, held_out, names)


def megabytes(texts: dict[str, str]) -> float:
    """Return the UTF-8 size of texts in MB."""
    return sum(len(text.encode()) for text in texts.values()) / 1e6


def seconds(work: Callable[[], object]) -> float:
    """Return the processor seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def medians(rounds: int, *prepare: Callable[[], Callable[[], object]]) -> list[float]:
    """Return the median seconds of several works, run in turn within each round.

    Args:
        rounds: Number of rounds.
        prepare: Functions that are called, untimed, before every run and return the work to time.
    """
    times: list[list[float]] = [[] for _ in prepare]
    for _ in range(rounds):
        for function, results in zip(prepare, times, strict=True):
            results.append(seconds(function()))
    return [statistics.median(results) for results in times]


def with_empty_cache(tokenizer: HybridTokenizer) -> HybridTokenizer:
    """Return a tokenizer with the same vocabulary and an empty cache, its tables built as after any first text."""
    copy = HybridTokenizer.from_vocabulary(tokenizer._vocabulary)
    words = " ".join(f"q{index}z" for index in range(1000))
    copy.decode(copy.encode_array(words))
    return copy


def measure_speed(
    label: str, own: HybridTokenizer, hugging_face: Baseline, tiktoken: Baseline, text: str, rounds: int
) -> dict[str, float]:
    """Measure encoding and decoding on one text; return speed ratios to the baselines."""
    text = text.encode()[:FRESH_BYTES].decode("utf-8", "ignore")
    warm = with_empty_cache(own)
    warm.encode_array(text)
    first, again, tiktoken_encode, hugging_face_encode = medians(
        rounds,
        lambda: partial(with_empty_cache(own).encode_array, text),
        lambda: lambda: warm.encode_array(text),
        lambda: lambda: tiktoken.encode(text),
        lambda: lambda: hugging_face.encode(text),
    )
    own_array = warm.encode_array(text)
    own_list = own_array.tolist()
    tiktoken_list = tiktoken.encode(text).tolist()
    decode_array, decode_list, tiktoken_decode = medians(
        rounds,
        lambda: lambda: warm.decode(own_array),
        lambda: lambda: warm.decode(own_list),
        lambda: lambda: tiktoken.decode(tiktoken_list),
    )
    size = len(text.encode()) / 1e6
    print(
        f"{label}: {size:.1f} MB; encode MB/s: first pass {size / first:.1f}, again {size / again:.1f}, tiktoken "
        f"{size / tiktoken_encode:.1f}, Hugging Face {size / hugging_face_encode:.2f}; decode MB/s: array "
        f"{size / decode_array:.0f}, list {size / decode_list:.0f}, tiktoken {size / tiktoken_decode:.0f}",
        flush=True,
    )
    return {
        "first/tiktoken": tiktoken_encode / first,
        "again/tiktoken": tiktoken_encode / again,
        "first/hugging_face": hugging_face_encode / first,
        "again/hugging_face": hugging_face_encode / again,
        "array/tiktoken": tiktoken_decode / decode_array,
        "list/tiktoken": tiktoken_decode / decode_list,
    }


def measure_training(texts: list[str], vocab_size: int, rounds: int) -> float:
    """Return the processor seconds of training divided by those of Hugging Face."""

    def train() -> None:
        tokenizer = HybridTokenizer()
        for text in texts:
            tokenizer.add_text(text)
        tokenizer.freeze_vocab(vocab_size=vocab_size)

    own, hugging_face = medians(rounds, lambda: train, lambda: lambda: baselines.train_hugging_face(texts, vocab_size))
    print(f"train {vocab_size}: {own:.1f} s, Hugging Face {hugging_face:.1f} s", flush=True)
    return own / hugging_face


def measure_load(name: str, rounds: int) -> float:
    """Return the milliseconds of processor time from the start of a process to the first ids of a tokenizer."""
    code = f"from tokenizer import HybridTokenizer as H; H.pretrained({name!r}).encode('Hello, world!')"
    processor = []
    wall_clock = []
    for _ in range(rounds + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall_clock.append(1000 * (time.perf_counter() - start))
        processor.append(1000 * (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime))
    # The first process reads the files from the disk.
    result = statistics.median(processor[1:])
    print(f"load {name}: {result:.0f} ms processor time, {statistics.median(wall_clock[1:]):.0f} ms wall-clock time")
    return result


def train_all(texts: list[str], vocab_size: int, target: Path) -> None:
    """Train every tokenizer of one size and save it to a folder."""
    options: dict[str, dict[str, Any]] = {
        "words": {},
        "spaces": {"boundaries": "spaces"},
        "spaces and phrases": {"boundaries": "spaces", "phrases": 0.15 if vocab_size < LARGE else 0.3},
    }
    for name in CONFIGURATIONS:
        tokenizer = HybridTokenizer()
        for text in texts:
            tokenizer.add_text(text)
        tokenizer.freeze_vocab(vocab_size=vocab_size, **options[name])
        tokenizer.save(target / name)
    baselines.train_hugging_face(texts, vocab_size).save(str(target / "hf.json"))


def load_trained(texts: list[str], vocab_size: int) -> tuple[list[HybridTokenizer], Any]:
    """Return the tokenizers of `CONFIGURATIONS` and the Hugging Face tokenizer.

    They are trained in another process, so that the memory of this one is as that of a user.
    """
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        process = multiprocessing.get_context("spawn").Process(target=train_all, args=(texts, vocab_size, target))
        process.start()
        process.join()
        own = [HybridTokenizer.load(target / name) for name in CONFIGURATIONS]
        return own, Tokenizer.from_file(str(target / "hf.json"))


def compare_compression(
    own: list[HybridTokenizer], hugging_face: Baseline, corpus: Corpus, vocab_size: int
) -> list[Result]:
    """Compare bytes per token on the held-out text with Hugging Face."""
    tokens = {
        name: [len(hugging_face.encode(text)), *(tokenizer.count(text) for tokenizer in own)]
        for name, text in corpus.held_out.items()
    }
    for name, (baseline, *counts) in tokens.items():
        ratios = ", ".join(f"{baseline / count:.3f}" for count in counts)
        print(f"  {vocab_size} {name:15} bytes/token relative to Hugging Face ({', '.join(CONFIGURATIONS)}): {ratios}")
    targets = (1.03, 1.03, 1.15 if vocab_size < LARGE else 1.25)
    results = []
    for label, names in (("all text", list(tokens)), ("English", corpus.english)):
        baseline, *counts = (sum(tokens[name][index] for name in names) for index in range(len(own) + 1))
        for configuration, count, target in zip(CONFIGURATIONS, counts, targets, strict=True):
            title = f"bytes/token vs HF BPE, {configuration}, {vocab_size}, {label}"
            results.append(Result(title, target, baseline / count))
    return results


def compare_speed(
    own: HybridTokenizer, hugging_face: Baseline, tiktoken: Baseline, corpus: Corpus, vocab_size: int, rounds: int
) -> list[Result]:
    """Compare the speed of encoding and decoding with tiktoken and Hugging Face."""
    english = "".join(corpus.held_out[name] for name in corpus.english)
    english += "".join(corpus.training[name] for name in corpus.english)
    other = "".join(corpus.held_out[name] for name in corpus.other)
    other += "".join(corpus.training[name][:500_000] for name in corpus.other)
    results = []
    for label, text, fresh_target in (("English", english, 1.0), ("other", other, 0.6)):
        where = f"{vocab_size}, {label}"
        ratio = measure_speed(f"{vocab_size} {label}", own, hugging_face, tiktoken, text, rounds)
        results += [
            Result(f"encode seen text vs tiktoken, {where}", 2.0, ratio["again/tiktoken"]),
            Result(f"encode fresh text vs tiktoken, {where}", fresh_target, ratio["first/tiktoken"]),
            Result(f"encode seen text vs Hugging Face, {where}", 13.0, ratio["again/hugging_face"]),
            Result(f"encode fresh text vs Hugging Face, {where}", 4.0, ratio["first/hugging_face"]),
            Result(f"decode array vs tiktoken, {where}", 1.0, ratio["array/tiktoken"]),
            Result(f"decode list vs tiktoken, {where}", 1.0, ratio["list/tiktoken"]),
        ]
    return results


def print_table(results: list[Result]) -> None:
    """Print the results with their targets."""
    print(f"\n{'quantity':55} {'target':>9} {'value':>9}")
    for result in results:
        sign = "<=" if result.at_most else ">="
        verdict = "reached" if result.is_reached else "NOT reached"
        print(f"{result.name:55} {sign}{result.target:7.2f} {result.value:9.3f}  {verdict}")


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with .txt files")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per measurement (default: 5)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[8192, 32768], help="vocabulary sizes (default: 8192 32768)"
    )
    parser.add_argument(
        "--skip",
        nargs="*",
        default=["analogies", "tinyshakespeare", "wikitext2_valid"],
        metavar="NAME",
        help="files to leave out, without .txt",
    )
    parser.add_argument(
        "--english",
        nargs="*",
        default=["*english*", "*stories*", "*shakespeare*"],
        metavar="PATTERN",
        help="patterns of the names of English files",
    )
    options = parser.parse_args()
    corpus = read_folder(options.folder, options.skip, options.english)
    training = list(corpus.training.values())
    print(f"{megabytes(corpus.training):.1f} MB of training text, {megabytes(corpus.held_out):.1f} MB of held-out text")
    results = []
    for size in options.sizes:
        own, model = load_trained(training, size)
        hugging_face = baselines.hugging_face(model)
        results += compare_compression(own, hugging_face, corpus, size)
        tiktoken = baselines.tiktoken_from(model)
        results += compare_speed(own[0], hugging_face, tiktoken, corpus, size, options.rounds)
    largest = max(options.sizes)
    ratio = measure_training(training, largest, min(options.rounds, 3))
    results.append(Result(f"train {largest} vs Hugging Face, CPU s", 0.6, ratio, at_most=True))
    for name in pretrained_names():
        if "-16k" in name:
            load_time = measure_load(name, options.rounds)
            results.append(Result(f"load {name} to first id, ms", 100.0, load_time, at_most=True))
    print_table(results)


if __name__ == "__main__":
    main()
