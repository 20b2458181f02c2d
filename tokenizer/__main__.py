"""The command `python -m tokenizer`: see tokenizer/cli.py."""

from tokenizer.cli import main

if __name__ == "__main__":
    main()
