"""The command `python -m slm_jax.plan`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from slm_jax.cli.dial import NO_DIAL, DialOptions, apply_rule
from slm_jax.cli.options import Flag, make_config, read_options_and_config
from slm_jax.planning.compilers import use_compiler, without_native_messages
from slm_jax.planning.targets import TARGETS
from slm_jax.utils.errors import UserError

if TYPE_CHECKING:
    from slm_jax.planning.plan import Plan


@dataclass(frozen=True)
class Options:
    """Compile the training step of a config for a TPU or GPU that is not present, and print what it needs.

    The device's own compiler runs on this machine; no text is read, nothing is computed. Printed for each device:
    memory of state and temporary arrays, the microbatch that fits, model FLOPs and those that the compiler counts,
    bytes accessed (TPUs), the bound of speed that results (roofline), collectives, and the time to compile. TPUs need
    pip install -e '.[plan-tpu]', GPUs pip install -e '.[plan-gpu]' (Linux).
    """

    device: Literal["h100", "h200", "a100", "l4", "t4", "v5e", "v6e", "v5p"]
    """NVIDIA H100 SXM, H200, A100 40 GB, L4, T4; TPU v5e, v6e, v5p."""
    config: Annotated[str, Flag(metavar="NAME|PATH")] = ""
    """Preset in configs/, or a TOML file; the options of the config override it."""
    devices: Annotated[int, Flag(metavar="N")] = 0
    """Number of devices; 0: as many as the options mesh.* name."""
    batch: Annotated[int, Flag(metavar="ROWS")] = 0
    """Sequences that each device computes at once, in a step that has no others; 0: the config's batch, in the largest
    microbatches that fit."""
    json: bool = False
    """Print one JSON object instead of text; its figures are of one device."""
    dial: DialOptions = NO_DIAL


def main(args: Sequence[str] | None = None) -> "Plan":
    """Run the command.

    Returns:
        The plan that was printed.

    Raises:
        UserError: The command line or the config is invalid, the compiler is not installed, or nothing fits.
    """
    options, overrides = read_options_and_config(Options, args, "python -m slm_jax.plan")
    for name in ("devices", "batch"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)}: should be 0 or more")
    target = TARGETS[options.device]
    config = make_config(apply_rule(options.dial, overrides, options.config), options.config)
    use_compiler(target.kind, target.name)
    with without_native_messages():
        from slm_jax.planning.plan import as_json, as_text, make_plan
    from slm_jax.utils.interrupt import exit_on_interrupt

    exit_on_interrupt()  # a compiler does not return to Python, where KeyboardInterrupt would be raised
    plan = make_plan(config, target, options.devices, options.batch)
    print(as_json(plan) if options.json else as_text(plan))
    return plan
