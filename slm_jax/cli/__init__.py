"""Commands, one module each: `python -m slm_jax.NAME` runs `slm_jax/cli/NAME.py`."""

from slm_jax.utils.interrupt import exit_on_interrupt, raise_on_interrupt
from tokenizer.streams import discard_unwritable_output, open_closed_streams


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
    open_closed_streams()
    import importlib

    from slm_jax.utils.command import command_errors
    from slm_jax.utils.process import without_garbage_collection

    try:
        with command_errors():
            with without_garbage_collection():
                main = importlib.import_module(module).main
            raise_on_interrupt()
            status = main()
            raise SystemExit(status if isinstance(status, int) else 0)
    except SystemExit as error:
        if error.code == 2:
            leave_threads_behind(2)
        raise
    finally:
        exit_on_interrupt()  # while the interpreter shuts down


def leave_threads_behind(status: int, seconds: float = 2.0) -> None:
    """End the process if threads are left that would keep it from ending: those of a failed save wait for minutes.

    Args:
        status: The exit status.
        seconds: Time in which the threads may end by themselves.
    """
    import os
    import threading
    import time

    end = time.monotonic() + seconds
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(end - time.monotonic(), 0))
            if thread.is_alive():
                discard_unwritable_output()
                os._exit(status)
