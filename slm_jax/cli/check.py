"""The command `python -m slm_jax.check`."""

import sys
from collections.abc import Sequence

from slm_jax.checks.finding import FAIL, as_json, as_table, count
from slm_jax.checks.run import DOCUMENTS, check
from slm_jax.cli.options import config_from_args, take_option
from slm_jax.config.presets import read_toml
from slm_jax.run.directory import find_run
from slm_jax.utils.errors import UserError

HELP = """Check a run, or a config before it is run: shapes, labels, masks, gradients, memory, tokenizer; after
training the loss against baselines and against what was noted, generation, the texts that are predicted worst.

With neither --run nor an option: the newest run in runs/.

--run PATH           the run; of one with a checkpoint the trained weights are checked
--config NAME|PATH   a preset or a TOML file that is yet to be run; every option below overrides it
--format table|json  json: one object, {"ok": …, "checks": [{"name", "verdict", "found", "expected", "details"}]}
--worst N            held-out texts shown, those predicted worst (default 3)
--documents N        of a source on the hub that are read where no run holds them (default 2000; 0: all)

Exit status: 0 all is well, 1 a check failed, 2 a mistake in the command."""


def main(args: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. Raises UserError."""
    rest = list(sys.argv[1:] if args is None else args)
    path, rest = take_option(rest, "run")
    form, rest = take_option(rest, "format")
    if form not in (None, "table", "json"):
        raise UserError(f"--format {form}: should be table or json")
    numbers = []
    for name, default in (("worst", 3), ("documents", DOCUMENTS)):
        value, rest = take_option(rest, name)
        if value is not None and not value.isdecimal():
            raise UserError(f"--{name} {value}: should be a whole number")
        numbers.append(default if value is None else int(value))
    wants_run = path is not None or not rest
    run = find_run(path) if wants_run else None
    base = read_toml(run.config) if run is not None else None
    config = config_from_args(rest, "python -m slm_jax.check", HELP, base)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # texts on any terminal
    from slm_jax.utils.process import tune_process

    tune_process()
    print(f"checking {run.path if run else 'the config'}", file=sys.stderr)
    found = check(run.path if run else None, config, worst=numbers[0], documents=numbers[1], say=_say)
    if form == "json":
        print(as_json({"run": str(run.path) if run else None}, found))
    else:
        print(as_table(found))
    return 1 if count(found, FAIL) else 0


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
