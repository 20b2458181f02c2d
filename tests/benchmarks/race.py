"""A race for small machines: python tests/benchmarks/race.py ENTRY [--text FILE] [--seeds 3]

Runs the command of tests/benchmarks/race/ENTRY.toml once for each seed, on two cores and with an empty cache, and
scores the run directory that it leaves. The rules are in tests/benchmarks/README.md. The text is tinyshakespeare, which
is downloaded once unless --text names a copy; its SHA-256 is verified.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
sys.path[0] = str(ROOT)

ENTRIES = Path(__file__).parent / "race"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
LIMIT = 1200.0  # processor seconds: two cores for ten minutes
CORES = 2
_BATCH = 32


class Result(NamedTuple):
    """Result of one seed."""

    bits_per_byte: float
    processor_seconds: float
    seconds: float
    parameters: int


def race_text(path: Path | None) -> bytes:
    """Return the verified text; a download is kept in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slm_jax" / "tinyshakespeare.txt"
    source = path or cache
    if path is None and not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(URL, timeout=60) as answer:
            cache.write_bytes(answer.read())
    text = source.read_bytes()
    if hashlib.sha256(text).hexdigest() != SHA256:
        raise SystemExit(f"{source} is not the text of the race: its SHA-256 differs")
    return text


def processor_seconds(session: int) -> float:
    """Return the processor seconds of all processes of a session, ended children of theirs included."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def train(command: list[str], cache: Path, limit: float) -> tuple[float, float]:
    """Run a command on two cores, and end it at the limit.

    Returns:
        Processor seconds and wall-clock seconds.
    """
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    used = 0.0
    while process.poll() is None:
        time.sleep(0.2)
        used = max(used, processor_seconds(process.pid))
        if used > limit:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"  ended at the limit of {limit:.0f} processor seconds: its last checkpoint counts")
            return used, time.monotonic() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with status {process.returncode}")
    return used, time.monotonic() - start


def score(run: Path, held_out: str) -> tuple[float, int]:
    """Return bits per byte of the held-out text, and the parameters of the model.

    The text is cut into windows of the training length; every token but the first one of the text is predicted, from
    the earlier ones of its window and the last one before it.
    """
    import jax
    import numpy as np

    from slm_jax.performance import flops
    from slm_jax.run.load import load_run

    loaded = load_run(str(run))
    tokens = np.asarray(loaded.tokenizer.encode_array(held_out))
    if loaded.tokenizer.decode(tokens.tolist()) != held_out:
        raise SystemExit("the tokenizer of the entry is not lossless on the held-out text")
    width = loaded.context
    nats = 0.0
    starts = range(0, len(tokens) - 1, width)
    for first in range(0, len(starts), _BATCH):
        rows = [tokens[start : start + width + 1] for start in starts[first : first + _BATCH]]
        ids = np.zeros((_BATCH, width + 1), np.int32)
        mask = np.zeros((_BATCH, width + 1), bool)
        for row, each in enumerate(rows):
            ids[row, : len(each)] = each
            mask[row, : len(each)] = True
        logits = loaded.model(ids[:, :-1], mask[:, :-1])
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        chosen = np.take_along_axis(np.asarray(log_probs, np.float64), ids[:, 1:, None], axis=-1)[..., 0]
        nats -= float(chosen[mask[:, 1:]].sum())
    count = flops.parameters(loaded.config.model, loaded.tokenizer.vocab_size)
    return nats / math.log(2) / len(held_out.encode()), count


def race(entry: Path, text: bytes, seed: int, limit: float) -> Result:
    """Train and score one seed of an entry; the training command sees the first nine tenths of the text only."""
    document = text.decode("utf-8")
    cut = len(document) * 9 // 10
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.txt").write_text(document[:cut], encoding="utf-8", newline="")
        names = {
            "python": sys.executable,
            "text": str(folder / "train.txt"),
            "run": str(folder / "run"),
            "seed": str(seed),
        }
        words = [word.format(**names) for word in tomllib.loads(entry.read_text(encoding="utf-8"))["command"]]
        used, seconds = train(words, folder / "cache", limit)
        bits, parameters = score(folder / "run", document[cut:])
    return Result(bits, used, seconds, parameters)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", choices=sorted(path.stem for path in ENTRIES.glob("*.toml")))
    parser.add_argument("--text", type=Path, help="a copy of tinyshakespeare; default: download it once")
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of seeds, from 0 on; an entry of the table has three"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="processor seconds; entries of the table have 1200")
    options = parser.parse_args()
    text = race_text(options.text)
    results = []
    for seed in range(options.seeds):
        results.append(race(ENTRIES / f"{options.entry}.toml", text, seed, options.limit))
        bits, used, seconds, parameters = results[-1]
        print(
            f"  seed {seed}: {bits:.4f} bits per byte, {parameters:,} parameters, {used:.0f} processor seconds, "
            f"{seconds:.0f} s",
            flush=True,
        )
    scores = [each.bits_per_byte for each in results]
    spread = f" (standard deviation {statistics.stdev(scores):.4f})" if len(scores) > 1 else ""
    print(f"{options.entry}: {statistics.fmean(scores):.4f} bits per byte{spread}")


if __name__ == "__main__":
    main()
