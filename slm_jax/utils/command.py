"""The end of a command: exceptions become an exit status, and one line where the user can correct the problem."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from slm_jax.utils.errors import user_message
from tokenizer.streams import discard_unwritable_output, print_last


@contextmanager
def command_errors() -> Iterator[None]:
    """Run the body of a command: end with one line instead of a traceback where the user can correct the problem.

    Any other exception is a bug and keeps its traceback.

    Raises:
        SystemExit: With status 2 after a `UserError`, on a full disk (quota, file-size limit), without permission for a
            file, or without the device of JAX_PLATFORMS; 130 after Ctrl-C, 141 if the reader of the output (head, less)
            has gone. The status is the same where the line cannot be written.
    """
    try:
        with _flushed_output():
            yield
    except KeyboardInterrupt:
        _exit("stopped", 130)
    except BrokenPipeError:
        raise SystemExit(141) from None
    except Exception as error:
        text = user_message(error)
        if text is None:
            raise
        _exit(f"error: {text}", 2)
    finally:
        discard_unwritable_output()


@contextmanager
def _flushed_output() -> Iterator[None]:
    """Write all output of a body that succeeds, so that its errors are raised here."""
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise
        _flush_output()
        raise
    _flush_output()


def _flush_output() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _exit(text: str, status: int) -> None:
    print_last(text)
    raise SystemExit(status) from None
