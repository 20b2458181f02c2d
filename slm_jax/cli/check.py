"""The command `python -m slm_jax.check`."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from slm_jax.checks.finding import DOCUMENTS, FAIL, as_json, as_table, count
from slm_jax.cli import bare_words
from slm_jax.cli.dial import NO_DIAL, DialOptions, apply_rule, measured_speed, require_memory
from slm_jax.cli.options import Flag, make_config, read_options_and_config
from slm_jax.config.schema import Config
from slm_jax.planning.presets import PresetTarget, targets_of
from slm_jax.planning.targets import TARGETS
from slm_jax.run.directory import find_run
from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

_USED = (
    *("model.", "optimizer.", "train.", "health.", "mesh.", "data.", "tokenizer.", "init."),
    "eval.max_tokens",
)


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
    device: Annotated[str, Flag(metavar="NAME")] = ""
    """With --config: compile the step also for this device (python -m slm_jax.plan --help lists them), or for none;
    empty: the first that the preset is for, if its compiler is installed."""
    format: Literal["table", "json"] = "table"
    """json: one object {"ok": …, "checks": [{"name", "verdict", "found", "expected", "details"}]}."""
    worst: Annotated[int, Flag(metavar="N")] = 3
    """Held-out texts that are shown, those with the highest loss."""
    documents: Annotated[int, Flag(metavar="N")] = DOCUMENTS
    """Documents of a hub source that are read if no run has them; 0: all."""
    dial: DialOptions = NO_DIAL


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status.

    Raises:
        UserError: The command line or the config is invalid.
    """
    options, overrides = read_options_and_config(Options, args, "python -m slm_jax.check", used=_USED)
    for name in ("worst", "documents"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)}: should be 0 or more")
    if options.run and options.dial:
        raise UserError("--size and --budget choose a new model, --run names an existing one: leave one of them out")
    run = None
    if options.run or not (options.config or overrides or options.dial):
        run = find_run(options.run or None)
    overrides = apply_rule(options.dial, overrides, options.config, measured_speed)
    config = make_config(overrides, options.config, run.read_options() if run is not None else None)
    require_memory(options.dial, config)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # texts on any terminal
    from slm_jax.checks.run import check
    from slm_jax.utils.process import tune_process
    from slm_jax.utils.progress import show_log

    tune_process()
    show_log()
    targets = _plan_targets(options, config)
    print(f"checking {run.path if run else 'the config'}", file=sys.stderr)
    path = run.path if run else None
    findings = check(path, config, worst=options.worst, documents=options.documents, step=options.step)
    if targets:
        from slm_jax.checks.planned import plan_fit

        logger.info("compiling for %s, which can take minutes", targets[0].device)
        findings += [plan_fit(config, target) for target in targets]
    if options.format == "json":
        print(as_json({"run": str(run.path) if run else None}, findings))
    else:
        print(as_table(findings))
    return 1 if count(findings, FAIL) else 0


def _plan_targets(options: Options, config: Config) -> list[PresetTarget]:
    """Return the devices that a plan is made for: at most one kind.

    Raises:
        UserError: There is no such device.
    """
    if options.device == "none" or (not options.config and not options.device):
        return []
    if not options.device:
        return targets_of(options.config)[:1]
    if options.device not in TARGETS:
        raise UserError(f"--device {options.device}: should be one of {', '.join(TARGETS)}, or none")
    return [
        PresetTarget(options.config, options.device, max(config.mesh.data, 1) * config.mesh.fsdp * config.mesh.tensor)
    ]
