"""The command `python -m slm_jax.benchmark_logger`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from slm_jax.cli import bare_words
from slm_jax.cli.options import Flag, read_options
from slm_jax.curriculum.benchmarks import default_file, measure, plot, table
from slm_jax.run.directory import find_run
from slm_jax.run.results import append_benchmark, read_benchmarks
from slm_jax.utils.errors import UserError


@dataclass(frozen=True)
class Options:
    """Append the scores of a run to a CSV file (once), and print the file as a table.

    A row has the run's last validation, its speed, and what they depend on: device, versions, config, commit.
    `python -m slm_jax.evaluate` measures more; `python -m slm_jax.report RUN RUN` compares runs.
    """

    run: Annotated[str, Flag(metavar="PATH", bare=bare_words.run_folders())] = ""
    """Run directory; empty: the newest in runs/."""
    csv: Annotated[str, Flag(metavar="FILE")] = ""
    """CSV file; empty: benchmarks.csv in the run, or in its curriculum. Several runs may share one."""
    plot: Annotated[str, Flag(metavar="FILE")] = ""
    """Also plot the rows as a PNG image."""
    show: bool = False
    """Only print the rows, append nothing."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: The command line is invalid, there is no such run, or a file cannot be read or written.
    """
    options = read_options(Options, args, "python -m slm_jax.benchmark_logger")
    run = None
    if options.run or not (options.csv and options.show):
        run = find_run(options.run or None, trained=True)
    path = Path(options.csv)
    if not options.csv and run is not None:
        path = default_file(run)
    for name, file in (("csv", path), ("plot", Path(options.plot or "plot.png"))):
        if file.is_dir():
            raise UserError(f"--{name} {file} is a folder: give a file")
    if run is not None and not options.show:
        if not path.parent.is_dir():
            print(f"note: the folder {path.parent} does not exist: created", file=sys.stderr)
        added = append_benchmark(path, measure(run))
        print(f"{path}: {'row added' if added else 'already has this row'}", file=sys.stderr)
    rows = read_benchmarks(path)
    if not rows:
        raise UserError(f"{path} has no rows")
    print(table(rows))
    if options.plot:
        plot(rows, Path(options.plot))
