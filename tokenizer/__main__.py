"""The command `python -m tokenizer`; see `tokenizer.cli`."""

import signal
import sys

from tokenizer.streams import end_at_once, open_closed_streams


def _exit(*_: object) -> None:
    end_at_once(b"stopped\n", 130)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)  # before the imports, which take most of the time until `main`
    open_closed_streams()
    from tokenizer.cli import main

    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
