"""Server speed: python tests/benchmarks/serve.py [--run PATH] [--streams 32] [--tokens 128] [--rounds 5]

Starts `python -m slm_jax.serve` on a run (default: the newest in runs/) and sends HTTP requests as clients do. Each
round measures in turn: first tokens on the idle server, one stream, and many parallel streams. The ratio of a round
compares adjacent measurements; the table gives median, minimum and maximum, in wall-clock time and in processor time of
the server, which other programs on the machine disturb less. Texts never end early.

Targets on a CPU: parallel streams 6 times as fast as one; first token within 100 ms when idle; page usable within 1 s
(in a real Chromium, if selenium and chromedriver are installed).
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
PROMPTS = ("Return the", "The list", "class", "Raised when", "import", "If the value is", "module", "A string")


async def stream(port: int, prompt: str, tokens: int, seed: int) -> tuple[float, float]:
    """Stream one completion; returns the seconds to the first and to the last token."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True, "seed": seed}
    body |= {"temperature": 0.8, "top_p": 0.95, "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    response = b""
    first = 0.0
    while part := await reader.read(65536):
        response += part
        if not first and b"data: " in response:
            first = time.perf_counter() - start
    writer.close()
    generated = re.search(rb'"completion_tokens": (\d+)', response)
    assert generated is not None, response[:500]
    assert int(generated[1]) == tokens, response[-500:]
    return first, time.perf_counter() - start


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(port: int, pid: int, streams: int, tokens: int, number: int) -> dict[str, float]:
    """Measure one round."""
    firsts = [(await stream(port, PROMPTS[i % 8], 1, number))[0] for i in range(10)]
    rates = {}
    for name, count in (("one", 1), ("many", streams)):
        processor_start = processor_seconds(pid)
        start = time.perf_counter()
        repeats = 4 if count == 1 else 1
        for _ in range(repeats):
            jobs = (stream(port, PROMPTS[i % 8], tokens, number * streams + i) for i in range(count))
            await asyncio.gather(*jobs)
        generated = repeats * count * tokens
        processor = max(processor_seconds(pid) - processor_start, 1e-9)
        rates[f"{name}, tokens/s"] = generated / (time.perf_counter() - start)
        rates[f"{name}, tokens per processor second"] = generated / processor
    result = {"first token, ms": 1e3 * float(np.median(firsts)), **rates}
    for unit in ("tokens/s", "tokens per processor second"):
        result[f"ratio, {unit}"] = rates[f"many, {unit}"] / rates[f"one, {unit}"]
    return result


def page_seconds(port: int) -> float | None:
    """Return the seconds until the page is usable in a browser with an empty cache; None without a browser."""
    try:
        from tests.serve.browser import open_browser
    except ImportError:
        return None
    if not shutil.which("chromedriver"):
        return None
    with open_browser() as browser:
        browser.get("about:blank")
        start = time.perf_counter()
        browser.get(f"http://localhost:{port}/")
        while browser.execute_script("return document.body.dataset.ready") != "yes":
            time.sleep(0.005)
        return time.perf_counter() - start


def serve(args: argparse.Namespace) -> tuple[subprocess.Popen[str], int]:
    """Start the server; returns its process and port once it is ready."""
    command = [
        sys.executable,
        "-m",
        "slm_jax.serve",
        "--port",
        "0",
        "--slots",
        str(args.slots),
        "--rows",
        str(args.rows),
    ]
    command += ["--run", args.run] if args.run else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", flush=True)
        if address := re.match(r"http://localhost:(\d+)/", line):
            wait_until_compiled(int(address[1]))
            return process, int(address[1])
    raise SystemExit("the server did not start")


def wait_until_compiled(port: int) -> None:
    """Wait for status 200 of /health, which has 503 while programs are compiled."""
    while True:
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/health"):
                return
        except OSError:
            time.sleep(0.2)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="", help="run directory; default: the newest in runs/")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="tokens per text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--rows", type=int, default=0)
    args = parser.parse_args()
    process, port = serve(args)
    try:
        asyncio.run(measure(port, process.pid, args.streams, args.tokens, 0))  # the first round warms up
        rounds = [asyncio.run(measure(port, process.pid, args.streams, args.tokens, 1 + i)) for i in range(args.rounds)]
        pages = [seconds for _ in range(3) if (seconds := page_seconds(port)) is not None]
    finally:
        process.terminate()
        process.wait()
    print(f"\n{args.streams} streams of {args.tokens} tokens, {args.rounds} rounds: median (minimum - maximum)")
    for name in rounds[0]:
        values = np.array([each[name] for each in rounds])
        print(f"  {name:36} {np.median(values):10,.1f} ({values.min():,.1f} - {values.max():,.1f})")
    if pages:
        print(f"  {'page usable, s':36} {np.median(pages):10.2f} ({min(pages):.2f} - {max(pages):.2f})")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
