"""The command `python -m tokenizer`; see `tokenizer.cli`."""

import os
import signal
import sys


def _exit(*_: object) -> None:
    os.write(2, b"stopped\n")  # print is not safe in a signal handler
    os._exit(130)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)  # before the imports, which take most of the time until `main`
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the process was started with this stream closed
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, PTH123
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    from tokenizer.cli import main

    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
