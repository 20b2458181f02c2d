"""The command `python -m tokenizer`; see `tokenizer.cli`."""

import sys

from tokenizer.cli import main

if __name__ == "__main__":
    sys.exit(main())
