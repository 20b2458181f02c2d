"""Commands, one module each: `python -m slm_jax.NAME` runs `slm_jax/cli/NAME.py`."""

from slm_jax.utils.interrupt import exit_on_interrupt, raise_on_interrupt


def run_command(module: str, name: str) -> None:
    """Run a command's `main` if its module is the program that was started, and exit with its status.

    Commands are run, never imported: as a submodule, `slm_jax.train` would hide the function of the same name.

    Args:
        module: `__name__` of the calling module.
        name: The command, a module of this package.
    """
    if module == "__main__":
        run_main(f"slm_jax.cli.{name}")


def run_main(module: str) -> None:
    """Run the function `main` of a module as the program, and exit with the status that it returns.

    Args:
        module: Full name of the module; it is imported here, where Ctrl-C is expected.
    """
    exit_on_interrupt()  # before the imports, which take most of the first second
    import importlib

    from slm_jax.utils.errors import command_errors

    try:
        with command_errors():
            main = importlib.import_module(module).main
            raise_on_interrupt()
            status = main()
            raise SystemExit(status if isinstance(status, int) else 0)
    finally:
        exit_on_interrupt()  # while the interpreter shuts down
