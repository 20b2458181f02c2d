"""The folder of a command that trains several runs: locked while it is used, and continued by the same command."""

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slm_jax.utils.errors import UserError
from slm_jax.utils.files import locked_folder
from tokenizer.streams import print_last

_MAX_SEEDS = 1000


def holds_definition(folder: Path, name: str) -> bool:
    """Return whether a folder has the definition of its trials; false for a new or empty folder.

    Args:
        folder: The folder.
        name: The file of the definition, `sweep.toml`.

    Raises:
        UserError: The folder holds something else.
    """
    if (folder / name).is_file():
        return True
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if any(not each.startswith(".") for each in names):
        raise UserError(f"--to {folder} is not empty and holds no {Path(name).stem}: give another folder")
    return False


@contextmanager
def trials_folder(folder: Path, prog: str) -> Iterator[Callable[[int | None], None]]:
    """Create and lock a folder for the trials of a command.

    Args:
        folder: The folder.
        prog: The command, `python -m slm_jax.sweep`.

    Yields:
        A function that ends the command with the status of the signal that stopped a trial; without one, given None,
        it does nothing.

    Raises:
        UserError: The folder cannot be written, or is in use.
        SystemExit: Stopped by a signal; the command that continues is printed.
    """
    again = f"{prog} --to {shlex.quote(str(folder))}"

    def stop(number: int | None) -> None:
        if number is not None:
            print(f"stopped by {signal.Signals(number).name}, saved. Continue with:\n  {again}")
            raise SystemExit(128 + number)

    try:
        with locked_folder(folder, f"running the trials in {folder}", "--to"):
            yield stop
    except BrokenPipeError:  # of the output
        raise
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    except KeyboardInterrupt:
        print_last(f"stopped. Continue with:\n  {again}")
        raise SystemExit(130) from None


def require_seeds(seeds: int | None) -> None:
    """Check the option `--seeds`; None: it is not given.

    Raises:
        UserError: There are none, or more than _MAX_SEEDS: the trials are listed before the first begins.
    """
    if seeds is not None and not 1 <= seeds <= _MAX_SEEDS:
        raise UserError(f"--seeds {seeds} must be from 1 to {_MAX_SEEDS:,}")
