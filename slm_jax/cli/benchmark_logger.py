"""The command `python -m slm_jax.benchmark_logger`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_jax.cli.options import read_options
from slm_jax.curriculum.benchmarks import default_file, measure, plot, table
from slm_jax.run.directory import find_run
from slm_jax.run.results import append_benchmark, read_benchmarks
from slm_jax.utils.errors import UserError


@dataclass(frozen=True)
class Options:
    """Append the scores of a run to a CSV file (once), and show the file as a table.

    What is logged are its last validation on the held-out text, its speed, and what they depend on: device, versions,
    config, commit. `python -m slm_jax.evaluate` measures more; `python -m slm_jax.report RUN RUN` compares runs.
    """

    run: str = ""
    """The run directory; empty: the newest in runs/."""
    csv: str = ""
    """The file; empty: benchmarks.csv in the run, or in its curriculum. Several runs may share one."""
    plot: str = ""
    """Also draw the rows as a PNG of this name."""
    show: bool = False
    """Append nothing, only show what is there."""


def main(args: Sequence[str] | None = None) -> None:
    """The command line. Raises UserError."""
    options = read_options(Options, args, "python -m slm_jax.benchmark_logger")
    run = find_run(options.run or None, trained=True) if options.run or not (options.csv and options.show) else None
    path = Path(options.csv) if options.csv else default_file(run) if run else Path()
    for name, place in (("csv", path), ("plot", Path(options.plot or "plot.png"))):
        if place.is_dir():
            raise UserError(f"--{name} {place} is a folder: give a file")
    if run is not None and not options.show:
        print(
            f"{path}: {'one row more' if append_benchmark(path, measure(run)) else 'this row is there already'}",
            file=sys.stderr,
        )
    rows = read_benchmarks(path)
    if not rows:
        raise UserError(f"there are no rows in {path}")
    print(table(rows))
    if options.plot:
        plot(rows, Path(options.plot))
