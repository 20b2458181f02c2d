"""Reference results of presets: python tests/benchmarks/references.py [minute quickstart] [--seeds 3]

Trains each preset with several seeds (runs/references/NAME-seedN; a run that is finished is not repeated), writes their
validation curves to configs/references/NAME.json, which `python -m slm_jax.report --against reference` reads, and the
table of configs/README.md. Remove runs/references after a change of the presets. The table's time is that of this
machine: measure on an idle one, or give --busy, which leaves the time out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
sys.path[0] = str(ROOT)

from slm_jax.config.presets import reference_names, reference_path  # noqa: E402  # after the path is set
from slm_jax.report.reference import Reference, read_reference  # noqa: E402
from slm_jax.utils.files import replace_text  # noqa: E402
from slm_jax.utils.formatting import duration  # noqa: E402

README = ROOT / "configs" / "README.md"
START, END = "<!-- references: written by tests/benchmarks/references.py -->\n", "<!-- end of references -->\n"


def make(name: str, seeds: int, folder: Path) -> None:
    """Train the seeds of a preset that are not finished, and write its reference."""
    runs = [folder / f"{name}-seed{seed}" for seed in range(seeds)]
    for seed, run in enumerate(runs):
        command = [sys.executable, "-m", "slm_jax.train", "--config", name, "--train.seed", str(seed)]
        subprocess.run([*command, "--run", str(run)], cwd=ROOT, check=True)
    path = reference_path(name)
    path.parent.mkdir(exist_ok=True)
    report = [sys.executable, "-m", "slm_jax.report", *map(str, runs), "--reference", str(path)]
    subprocess.run(report, cwd=ROOT, check=True)


def table(references: list[Reference], busy: bool) -> str:
    """Return the table of configs/README.md."""
    if not references:
        return "None has been made yet.\n"
    lines = ["| preset | bits per byte | standard deviation | seeds | time | machine |", "|---|---|---|---|---|---|"]
    for reference in references:
        mean, spread = reference.final
        about = reference.environment
        machine = f"{about.get('cores')} cores of {about.get('processor')}, Python {about.get('python')}"
        machine += f", jax {about.get('packages', {}).get('jax')}"
        time = "machine in use" if busy else duration(reference.seconds)
        lines.append(
            f"| `{reference.name}` | {mean:.4f} | {spread:.4f} | {len(reference.curves)} | {time} | {machine} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["minute", "quickstart"], metavar="PRESET")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each preset, two or more")
    parser.add_argument("--to", type=Path, default=ROOT / "runs" / "references", help="folder of the runs")
    parser.add_argument("--busy", action="store_true", help="other programs use the machine: leave the time out")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: a spread needs two or more")
    for name in options.presets:
        make(name, options.seeds, options.to.absolute())
        write_table(options.busy)


def write_table(busy: bool) -> None:
    """Replace the table of configs/README.md by that of all references."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    references = [read_reference(reference_path(name)) for name in reference_names()]
    replace_text(README, f"{before}{START}{table(references, busy)}{END}{after}")


if __name__ == "__main__":
    main()
