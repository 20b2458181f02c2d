"""The command `python -m tokenizer`; see `tokenizer.cli`."""

import signal
import sys

if __name__ == "__main__":
    raises_on_interrupt = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if raises_on_interrupt:  # Ctrl-C during the import ends the process without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tokenizer.cli import main

    if raises_on_interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
