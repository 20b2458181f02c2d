"""The command `python -m slm_jax.report`: write the report of a run, or compare several."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from slm_jax.cli import bare_words
from slm_jax.cli.options import Flag, read_options
from slm_jax.utils.errors import UserError


@dataclass(frozen=True)
class Options:
    """Write the report of one run (which may still be training, or be a curriculum), or compare several runs.

    The report is one HTML file that works offline; a summary is printed. Several runs are sorted by validation bits per
    byte, which is comparable between tokenizers on the same held-out text.

        python -m slm_jax.report                      the newest run: runs/NAME/report.html
        python -m slm_jax.report runs/A runs/B        runs/comparison.html
        python -m slm_jax.report --against mine.json  is the run on track? (made with --reference)
    """

    runs: Annotated[tuple[str, ...], Flag(positional=True, bare=bare_words.run_folders())] = ()
    """Run directories; none: the newest in runs/."""
    run: Annotated[str, Flag(metavar="PATH")] = ""
    """A run directory, as for the other commands."""
    to: Annotated[str, Flag(metavar="FILE")] = ""
    """The file to write; empty: report.html in the run, or comparison.html next to the first of several."""
    against: Annotated[str, Flag(metavar="reference|NAME|PATH")] = ""
    """Compare the run with a reference result: a file, one of configs/references by name, or the nearest one of these
    (reference)."""
    reference: Annotated[str, Flag(metavar="PATH")] = ""
    """Write a reference result of the runs, finished seeds of one config, to this JSON file."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Arguments; None: those of the process.

    Raises:
        UserError: A run cannot be read, or the page cannot be written.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    options = read_options(Options, args, "python -m slm_jax.report")
    from slm_jax.report import terminal
    from slm_jax.report.compare import comparison_html, default_path
    from slm_jax.report.page import report_html, write_page, write_report
    from slm_jax.report.reference import find_references, make_reference, write_reference
    from slm_jax.report.run_data import read_report_data
    from slm_jax.report.track import track
    from slm_jax.run.directory import Run

    paths = [Path(run) for run in (options.run, *options.runs) if run]
    to = Path(options.to) if options.to else None
    if to is not None and to.is_dir():
        raise UserError(f"--to {to} is a folder: give a file, such as {to / 'report.html'}")
    lines: Iterator[str]
    if options.against and options.reference:
        raise UserError("--reference writes a reference, --against compares a run with one: give one of them")
    if options.against and len(paths) > 1:
        raise UserError("--against compares one run with a reference: give one run")
    if options.reference:
        reference = make_reference(Path(options.reference).stem, [read_report_data(path) for path in paths])
        write_reference(reference, Path(options.reference))
        mean, spread = reference.final
        print(
            f"{mean:.4f} bits per byte, standard deviation {spread:.4f} over {len(paths)} seeds\n\n{options.reference}"
        )
        return
    if len(paths) <= 1 and options.against:
        data = read_report_data(paths[0] if paths else None)
        compared = track(data, find_references(options.against))
        target = to or Run(data.path).report
        write_page(target, report_html(data, compared))
        lines = itertools.chain(terminal.run_summary(data), compared.lines())
    elif len(paths) <= 1:
        data, target = write_report(paths[0] if paths else None, to)
        lines = terminal.run_summary(data)
    else:
        resolved = [path.resolve() for path in paths]
        if twice := [str(path) for i, path in enumerate(paths) if resolved[i] in resolved[:i]]:
            raise UserError(f"{twice[0]} is given twice: give each run once")
        if missing := [str(path) for path in paths if not bare_words.is_run(str(path))]:
            raise UserError(f"no run in {', '.join(missing)}")
        runs = [read_report_data(path) for path in paths]
        target = to or default_path(runs)
        write_page(target, comparison_html(runs))
        lines = terminal.comparison_summary(runs)
    for line in lines:
        print(line)
    print(f"\n{target}")
