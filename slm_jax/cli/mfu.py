"""The command `python -m slm_jax.mfu`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from slm_jax.cli import bare_words
from slm_jax.cli.dial import NO_DIAL, DialOptions, apply_rule, measured_speed, require_memory
from slm_jax.cli.options import Flag, make_config, read_options_and_config
from slm_jax.run.directory import find_run
from slm_jax.utils.errors import UserError

if TYPE_CHECKING:
    from slm_jax.training.mfu import Report


_USED = ("model.", "optimizer.", "train.", "health.", "mesh.", "tokenizer.path", "tokenizer.vocab_size")


@dataclass(frozen=True)
class Options:
    """Measure the matrix speed of the device and the MFU of a config's training step.

    The step runs on random token ids of the config's shape: no text is read, nothing is written. MFU is model FLOPs
    per second (with the causal half of attention) as a fraction of the vendor's peak, where the device is known, and
    of the fastest matrix product measured on it.
    """

    config: Annotated[str, Flag(metavar="NAME|PATH")] = ""
    """Preset in configs/, or a TOML file; the options of the config override it."""
    run: Annotated[str, Flag(metavar="PATH", bare=bare_words.run_folders(config=True))] = ""
    """Use the config and the tokenizer of this run."""
    steps: Annotated[int, Flag(metavar="N")] = 10
    """Timed steps."""
    trace: Annotated[str, Flag(metavar="FOLDER")] = ""
    """Write a profile of three further steps there (TensorBoard, Perfetto)."""
    json: bool = False
    """Print one JSON object instead of text."""
    dial: DialOptions = NO_DIAL


def main(args: Sequence[str] | None = None) -> "Report":
    """Run the command.

    Returns:
        The report that was printed.

    Raises:
        UserError: The command line or the config is invalid.
    """
    options, overrides = read_options_and_config(Options, args, "python -m slm_jax.mfu", used=_USED)
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: should be a whole number, 1 or more")
    base = None
    if options.run and options.dial:
        raise UserError("--size and --budget choose a new model, --run names an existing one: leave one of them out")
    if options.run:
        run = find_run(options.run)
        base = run.read_options()
        base["tokenizer"] = {**base.get("tokenizer", {}), "path": str(run.tokenizer)}
    overrides = apply_rule(options.dial, overrides, options.config, measured_speed)
    config = make_config(overrides, options.config, base)
    require_memory(options.dial, config)
    if config.lora.rank:
        raise UserError(
            f"lora.rank {config.lora.rank}: slm_jax.mfu measures the training of all parameters, give --lora.rank 0; "
            "training with adapters logs its own MFU"
        )
    if config.train.objective == "dpo":
        raise UserError(
            "train.objective dpo: slm_jax.mfu measures next-token steps on random ids, give "
            "--train.objective next-token; training with dpo logs its own MFU"
        )
    from slm_jax.training.mfu import as_json, as_text, measure, vocabulary
    from slm_jax.utils.process import tune_process

    tune_process()
    report = measure(config, vocabulary(config), options.steps, options.trace)
    print(as_json(report) if options.json else as_text(report))
    return report
