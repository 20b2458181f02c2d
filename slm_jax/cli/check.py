"""The command `python -m slm_jax.check`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from slm_jax.checks.finding import DOCUMENTS, FAIL, as_json, as_table, count
from slm_jax.cli import bare_words
from slm_jax.cli.options import Flag, make_config, read_options_and_config
from slm_jax.run.directory import find_run
from slm_jax.utils.errors import UserError


@dataclass(frozen=True)
class Options:
    """Check a run, or a config before it is run.

    Shapes, labels, masks, gradients, memory and tokenizer; after training also the loss against baselines and against
    the logged validation, generation, and the texts with the highest loss. Without options: the newest run in runs/.

    Exit status: 0 all checks passed; 1 a check failed; 2 invalid usage.
    """

    run: Annotated[str, Flag(metavar="PATH", bare=bare_words.run_folders(config=True))] = ""
    """Run directory; if it has a checkpoint, the trained weights are checked."""
    step: Annotated[str, Flag(metavar="best|last|N")] = ""
    """The checkpoint; empty: the best one if the validation does not improve any more, otherwise the last."""
    config: Annotated[str, Flag(metavar="NAME|PATH")] = ""
    """Preset in configs/, or a TOML file, that has not been run yet; the options of the config override it."""
    format: Literal["table", "json"] = "table"
    """json: one object {"ok": …, "checks": [{"name", "verdict", "found", "expected", "details"}]}."""
    worst: Annotated[int, Flag(metavar="N")] = 3
    """Held-out texts that are shown, those with the highest loss."""
    documents: Annotated[int, Flag(metavar="N")] = DOCUMENTS
    """Documents of a hub source that are read if no run has them; 0: all."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status.

    Raises:
        UserError: The command line or the config is invalid.
    """
    options, overrides = read_options_and_config(Options, args, "python -m slm_jax.check")
    for name in ("worst", "documents"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)}: should be 0 or more")
    run = None
    if options.run or not (options.config or overrides):
        run = find_run(options.run or None)
    config = make_config(overrides, options.config, run.read_options() if run is not None else None)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # texts on any terminal
    from slm_jax.checks.run import check
    from slm_jax.utils.process import tune_process
    from slm_jax.utils.progress import show_log

    tune_process()
    show_log()
    print(f"checking {run.path if run else 'the config'}", file=sys.stderr)
    path = run.path if run else None
    findings = check(path, config, worst=options.worst, documents=options.documents, step=options.step)
    if options.format == "json":
        print(as_json({"run": str(run.path) if run else None}, findings))
    else:
        print(as_table(findings))
    return 1 if count(findings, FAIL) else 0
