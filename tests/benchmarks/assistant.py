"""Quality and processor time of the offline assistant: python tests/benchmarks/assistant.py --folder runs/assistants

Trains the curriculum `chat-offline` once for each seed, evaluates the last stage with the tasks `heldout`,
`chat-facts`, `chat-format` and `chat-instructions`, and prints for each seed: processor seconds of the training command
(all its processes, from start to end), shares of right, wrong and refused answers to held-out phrasings of documented
facts, of invented names that are refused, and of turns that end, with 95 % intervals. The targets are 60 % right, 90 %
ended and 50 % refused after 1,200 processor seconds, ten minutes on two cores. Stopped with Ctrl-C it resumes, and adds
up the processor time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TASKS = ("heldout", "chat-facts", "chat-format", "chat-instructions")
COLUMNS = (  # task, metric, head of the column
    ("chat-facts", "right_share", "right"),
    ("chat-facts", "wrong_share", "wrong"),
    ("chat-facts", "refused_share", "refused"),
    ("chat-facts", "invented_refused_share", "invented refused"),
    ("chat-facts", "invented_right_share", "and named"),
    ("chat-format", "ended_share", "ended"),
    ("chat-format", "clean_share", "clean"),
    ("chat-instructions", "prompt_share", "instructions"),
    ("heldout", "bits_per_byte", "bits per byte"),
)


def train(folder: Path, seed: int, options: list[str]) -> bool:
    """Train or resume the curriculum of a seed, and add the time of this call to `times.jsonl` next to it.

    Returns:
        Whether it is finished.
    """
    command = [sys.executable, "-m", "slm_jax.orchestrator", "--config", "chat-offline", "--run", str(folder)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--train.seed", str(seed), *options], cwd=ROOT)
    interrupted = False
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:  # the terminal sends it to both processes; the other one saves
            interrupted = True
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {"cpu_s": used.ru_utime + used.ru_stime, "wall_s": time.perf_counter() - start, "status": status}
    with times_file(folder).open("a") as file:
        file.write(json.dumps(row) + "\n")
    return status == 0 and not interrupted


def times_file(folder: Path) -> Path:
    """Return the file with the times of the calls for a curriculum."""
    return folder.with_suffix(".times.jsonl")


def times(folder: Path) -> list[dict[str, Any]]:
    """Return the times of the calls for a curriculum."""
    path = times_file(folder)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def evaluate(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Measure the last stage, and return the rows of complete tasks by task and metric."""
    stage = sorted((folder / "stages").iterdir())[-1]
    command = [sys.executable, "-m", "slm_jax.evaluate", "--run", str(stage), "--json", "--tasks", *TASKS]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = json.loads(output)["results"]
    return {(row["task"], row["metric"]): row for row in rows if row["group"] == "all"}


def show(folder: Path, seed: int) -> None:
    """Print the row of a seed, with intervals."""
    calls = times(folder)
    rows = evaluate(folder)
    print(f"seed {seed}: {sum(each['cpu_s'] for each in calls):,.0f} processor seconds in {len(calls)} calls")
    for task, metric, name in COLUMNS:
        row = rows[task, metric]
        print(f"  {name:18}{row['value']:8.4f}  ({row['low']:.4f} – {row['high']:.4f}), {row['count']:,} items")


def main() -> None:
    """Train and evaluate the seeds of the command line; options behind -- belong to the training command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/assistants"), help="where the curricula are stored")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("options", nargs="*", help="options of the training command")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        folder = args.folder.resolve() / f"seed-{seed}"
        calls = times(folder)
        if (not calls or calls[-1]["status"] != 0) and not train(folder, seed, args.options):
            sys.exit("not finished: run the same command again")
        show(folder, seed)


if __name__ == "__main__":
    main()
