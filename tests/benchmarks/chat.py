"""First token of each turn of a conversation: python tests/benchmarks/chat.py [--run PATH] [--turns 5] [--rounds 5]

Starts two servers on a run (default: the newest in runs/), one with the prefix cache and one without, and has the same
conversation with both, turn by turn. The answers must be equal. The table gives the time to the first token of each
turn, median, minimum and maximum over the rounds, and the ratio to the first turn of the same round. A user reads an
answer for a moment (--pause), in which the server may compute ahead.

Target: with the cache, the first token of turn five arrives within 1.5 times the time of turn one.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
QUESTIONS = (
    "What does the function os.path.join return if one of its arguments is empty?",
    "Which module of the standard library contains the class OrderedDict?",
    "How do I convert a string into an integer, and what happens if it is not one?",
    "What is the difference between a list and a tuple, and when do I use which?",
    "Name the exception that is raised when a key is not found in a dictionary.",
)


def start(args: argparse.Namespace, cache: int) -> tuple[subprocess.Popen[str], str]:
    """Start a server; returns its process and address once it has compiled its programs."""
    command = [sys.executable, "-m", "slm_jax.serve", "--port", "0", "--slots", "8", "--prefix_cache", str(cache)]
    command += ["--context", str(args.context), *(["--run", args.run] if args.run else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if address := re.match(r"(http://localhost:\d+)/", line):
            break
    else:
        raise SystemExit("the server did not start")
    while True:
        try:
            with urllib.request.urlopen(f"{address[1]}/health"):
                return process, address[1]
        except OSError:
            time.sleep(0.2)


def answer(url: str, messages: list[dict[str, str]], args: argparse.Namespace, seed: int) -> tuple[float, str, int]:
    """Return the seconds to the first token of an answer, its text, and the number of reused tokens."""
    body: dict[str, Any] = {"messages": messages, "max_completion_tokens": args.tokens, "seed": seed, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    start = time.perf_counter()
    first, text, reused = 0.0, "", 0
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", data, headers)) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                reused = event["usage"]["prompt_tokens_details"]["cached_tokens"]
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    first = first or time.perf_counter() - start
                    text += choice["delta"]["content"]
    return first, text, reused


def conversation(urls: list[str], args: argparse.Namespace, seed: int) -> np.ndarray:
    """Have the same conversation with all servers; returns seconds to the first token [servers, turns]."""
    firsts = np.zeros((len(urls), args.turns))
    messages: list[dict[str, str]] = [{"role": "system", "content": f"Answer question by question ({seed})."}]
    for turn in range(args.turns):
        messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
        texts = []
        for number, url in enumerate(urls) if (seed + turn) % 2 else reversed(list(enumerate(urls))):
            firsts[number, turn], text, _ = answer(url, messages, args, seed)
            texts.append(text)
        assert len(set(texts)) == 1, "the answers with and without the cache differ"
        messages.append({"role": "assistant", "content": texts[0]})
        time.sleep(args.pause)
    return firsts


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="", help="run directory; default: the newest in runs/")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=60, help="tokens per answer")
    parser.add_argument("--context", type=int, default=1024, help="tokens that attention sees")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between an answer and the next question")
    args = parser.parse_args()
    processes, urls = zip(*(start(args, cache) for cache in (512, 0)), strict=True)
    try:
        conversation(list(urls), args, 0)
        rounds = np.array(
            [conversation(list(urls), args, 1 + n) for n in range(args.rounds)]
        )  # [rounds, servers, turns]
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    print(f"first token in ms, {args.rounds} rounds: median (minimum - maximum), and the ratio to turn 1")
    for turn in range(args.turns):
        for server, name in enumerate(("with the cache", "without")):
            seconds = rounds[:, server, turn]
            ratio = np.median(seconds / rounds[:, server, 0])
            spread = f"({1e3 * seconds.min():.1f} - {1e3 * seconds.max():.1f})"
            print(f"  turn {turn + 1}, {name:15} {1e3 * np.median(seconds):8.1f} {spread:20} {ratio:6.2f}")


if __name__ == "__main__":
    main()
