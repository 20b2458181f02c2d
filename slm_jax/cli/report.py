"""The command line `python -m slm_jax.report`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from slm_jax.cli.options import Flag, read_options
from slm_jax.report import summary
from slm_jax.report.compare import comparison_html, default_place
from slm_jax.report.page import write, write_report
from slm_jax.report.run_data import read_subject
from slm_jax.utils.errors import UserError


@dataclass(frozen=True)
class Options:
    """A page to look at: one run (also one that is going on, or a curriculum), or several beside each other.

    One file that needs no network, and a summary here. Several runs are sorted by validation bits per byte, which can
    be compared between tokenizers, on the same held-out text.

        python -m slm_jax.report                      the newest run: runs/NAME/report.html
        python -m slm_jax.report runs/A runs/B        runs/comparison.html
    """

    runs: Annotated[tuple[str, ...], Flag(positional=True)] = ()
    """Run directories; none: the newest in runs/."""
    run: str = ""
    """The same for one run."""
    to: str = ""
    """The file to write; empty: report.html in the run, comparison.html beside the first of several."""


def main(args: Sequence[str] | None = None) -> None:
    """The command line. Raises UserError."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    options = read_options(Options, args, "python -m slm_jax.report")
    paths = [Path(run) for run in (*filter(None, [options.run]), *options.runs)]
    to = Path(options.to) if options.to else None
    if to is not None and to.is_dir():
        raise UserError(f"--to {to} is a folder: give a file, such as {to / 'report.html'}")
    if len(paths) <= 1:
        subject, target = write_report(paths[0] if paths else None, to)
        print("\n".join(summary.of_one(subject)))
    else:
        repeated = len(paths) - len({path.resolve() for path in paths})
        if repeated:
            raise UserError("a run is given twice: give each run once")
        subjects = [read_subject(path) for path in paths]
        target = to or default_place(subjects)
        write(target, comparison_html(subjects))
        print("\n".join(summary.of_several(subjects)))
    print(f"\n{target}")
