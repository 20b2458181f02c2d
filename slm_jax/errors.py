"""The one exception for a user's mistake, and how a command ends on it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can mend: the text says what was found, what was expected and what to do."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a UserError into its text on stderr and exit status 2; everything else keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorator for a command's `main`: user errors become one clear message and exit status 2."""

    def run() -> None:
        with exit_on_user_error():
            main()

    run.__doc__ = main.__doc__
    return run
