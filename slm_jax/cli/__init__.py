"""Commands, one module each: `python -m slm_jax.NAME` runs `slm_jax/cli/NAME.py`."""

import importlib

from slm_jax.utils.errors import command_errors


def run_command(module: str, name: str) -> None:
    """Run a command's `main` if its module is the program that was started, and exit with its status.

    Commands are run, never imported: as a submodule, `slm_jax.train` would hide the function of the same name.

    Args:
        module: `__name__` of the calling module.
        name: The command, a module of this package.
    """
    if module != "__main__":
        return
    with command_errors():
        status = importlib.import_module(f"slm_jax.cli.{name}").main()
        raise SystemExit(status if isinstance(status, int) else 0)
