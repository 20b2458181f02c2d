"""The arguments of `python -m tokenizer`: what can be given, help texts, and conversion of the words."""

from __future__ import annotations

import argparse
import math
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from tokenizer import TokenizerError, pretrained_names

_DESCRIPTION = """\
Train a tokenizer on text, encode and decode with it, inspect it, compare it with others.

  python -m tokenizer train 'books/**/*.txt' --out my.hybtok --vocab-size 8192
  echo 'Hello, world!' | python -m tokenizer encode my.hybtok
  echo 'Hello, world!' | python -m tokenizer encode my.hybtok | python -m tokenizer decode my.hybtok
  python -m tokenizer inspect my.hybtok --text 'Hello, world!' --merges 20
  python -m tokenizer compare my_text.txt
  python -m tokenizer serve

TOKENIZER is a saved file or the name of a pretrained tokenizer:
{names}.
"""
_TRAIN = """\
Learn a vocabulary from UTF-8 text files and save it to one file.

  python -m tokenizer train 'books/**/*.txt' --out my.hybtok
  python -m tokenizer train a.txt b.txt --out my.hybtok --vocab-size 32768 --processes 4

Quote patterns, so that the shell passes ** on to this program. 8192 ids suit a few MB of text,
32768 ids 50 MB and more. With --portable, a stock tokenizer.json gives the same ids, so that
models can be used without code of this project. Use the result with --tokenizer.path my.hybtok
in training, or with HybridTokenizer.load("my.hybtok") in Python.
"""
_ENCODE = """\
Encode text and print the ids, separated by spaces.

  echo 'Hello, world!' | python -m tokenizer encode english-16k
  python -m tokenizer encode my.hybtok book.txt > book.ids
  python -m tokenizer encode my.hybtok --mode rle table.txt      (id:count for repeated ids)
"""
_DECODE = """\
Decode ids (or id:count pairs) to exactly the text they were made from.

  echo 'Hello, world!' | python -m tokenizer encode my.hybtok | python -m tokenizer decode my.hybtok
  python -m tokenizer decode my.hybtok book.ids > book.txt
"""
_INSPECT = """\
Show the entries of a tokenizer, the tokens of a text, and how a token is made.

  python -m tokenizer inspect english-16k                            (special tokens, first entries)
  python -m tokenizer inspect english-16k --text 'Hello, world!'     (kind and text of each token)
  python -m tokenizer inspect english-16k --token ' welcome'         (its parts, down to the bytes)
  python -m tokenizer inspect english-16k --merges 20                (the most used merges)

A space belongs to the word after it: ' the' and 'the' are two tokens.
"""
_COMPARE = """\
Train this tokenizer and the other installed ones (Hugging Face tokenizers, tiktoken, sentencepiece)
on nine tenths of the text; print bytes per token and speed on the rest. More bytes per token means
fewer tokens for the same text.

  python -m tokenizer compare my_text.txt
  python -m tokenizer compare 'books/*.txt' --vocab-size 16384 --pretrained english-16k

Measuring speed takes about 2 MB of text; with less, only bytes per token are printed.
"""
_SERVE = """\
Serve a page that tokenizes text as you type: kinds, ids and parts of the tokens, bytes per token,
and two vocabularies side by side. Reachable from this machine only; stop with Ctrl-C.

  python -m tokenizer serve                        (the pretrained vocabularies)
  python -m tokenizer serve my.hybtok english-16k  (these)
"""

_MAY_BE_EMPTY = ("text", "note")
_POSITIONAL = ("tokenizer", "tokenizers", "file", "files")
_REQUIRED = ("tokenizer", "files", "out")


class _Number(NamedTuple):
    """Numbers that an option takes; those without bounds here are checked where they are used."""

    kind: type[int] | type[float] = int
    lowest: float = -math.inf
    highest: float = math.inf

    def describe(self) -> str:
        """Return what a word of the command line should be."""
        name = "a whole number" if self.kind is int else "a number"
        if self.highest < math.inf:
            return f"{name} from {self.lowest} to {self.highest}"
        return name if self.lowest == -math.inf else f"{name}, {self.lowest} or more"


_NUMBERS = {
    **dict.fromkeys(("vocab_size", "k_bases", "max_merges", "min_freq", "byte_limit", "processes"), _Number()),
    "phrases": _Number(float),
    "merges": _Number(lowest=0),
    "preview": _Number(lowest=0),
    "port": _Number(lowest=0, highest=65535),
}


class _Parser(argparse.ArgumentParser):
    """Parser that raises TokenizerError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise TokenizerError(f"{message.removeprefix('argument ')} ({self.prog} --help lists what can be given)")

    def print_help(self, file: Any = None) -> None:
        """Print the help; argparse would ignore that it cannot be written."""
        print(self.format_help(), end="", file=file, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the values of a command line, the command's name as `command`.

    Args:
        arguments: The command line without the program's name; None: `sys.argv`.

    Raises:
        TokenizerError: It is invalid.
        SystemExit: It asks for help, which was printed.
    """
    options = build_parser().parse_args(arguments)
    _refuse_empty_values(options)
    _convert_numbers(options)
    return options


def _refuse_empty_values(options: argparse.Namespace) -> None:
    """Refuse empty names of files and tokenizers, choices and numbers: they usually mean an unset shell variable.

    Raises:
        TokenizerError: A value is empty.
    """
    for name, value in vars(options).items():
        if name in _MAY_BE_EMPTY or "" not in (value if isinstance(value, list) else [value]):
            continue
        title = name.upper() if name in _POSITIONAL else f"--{name.replace('_', '-')}"
        raise TokenizerError(f"{title} is empty: give a value{'' if name in _REQUIRED else ', or leave it out'}")


def _convert_numbers(options: argparse.Namespace) -> None:
    """Convert the words of `_NUMBERS`.

    Raises:
        TokenizerError: A word is not such a number.
    """
    for name, word in vars(options).items():
        if name not in _NUMBERS or not isinstance(word, str):
            continue
        number = _NUMBERS[name]
        with suppress(ValueError):
            value = number.kind(word)
            if number.lowest <= value <= number.highest:
                setattr(options, name, value)
                continue
        raise TokenizerError(f"--{name.replace('_', '-')} {word}: should be {number.describe()}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    names = ", ".join(pretrained_names()) or "none in this installation"
    parser = _Parser(
        "python -m tokenizer",
        description=_DESCRIPTION.format(names=names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def add_command(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    _add_train_options(add_command("train", "learn a vocabulary from UTF-8 text files", _TRAIN))

    encode = add_command("encode", "encode text to ids", _ENCODE)
    _add_tokenizer_argument(encode)
    encode.add_argument("file", nargs="?", default="-", metavar="FILE", help="UTF-8 text (default: standard input)")
    encode.add_argument(
        "--mode", choices=("flat", "rle"), default="flat", help="flat: ids; rle: id:count pairs (default: flat)"
    )

    decode = add_command("decode", "decode ids or id:count pairs to text", _DECODE)
    _add_tokenizer_argument(decode)
    decode.add_argument("file", nargs="?", default="-", metavar="FILE", help="ids (default: standard input)")

    inspect = add_command("inspect", "show entries, the tokens of a text, or how a token is made", _INSPECT)
    _add_tokenizer_argument(inspect)
    inspect.add_argument("--text", help="show the tokens of this text")
    inspect.add_argument("--token", help="explain this token (its text or its id)")
    inspect.add_argument("--merges", default=0, metavar="N", help="show the N most used merges")
    inspect.add_argument("--preview", default=10, metavar="N", help="number of entries to show (default: 10)")

    _add_compare_options(add_command("compare", "compare with other installed tokenizers on your text", _COMPARE))

    serve = add_command("serve", "serve a page to try tokenizers on", _SERVE)
    serve.add_argument(
        "tokenizers", nargs="*", metavar="TOKENIZER", help="saved files or names (default: all pretrained ones)"
    )
    serve.add_argument("--port", default=8765, metavar="N", help="port on the loopback interface (default: 8765)")
    return parser


def _add_compare_options(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("files", nargs="+", metavar="FILES", help="files or glob patterns of UTF-8 text")
    compare.add_argument(
        "--vocab-size", default=8192, metavar="N", help="ids that each tokenizer learns (default: 8192)"
    )
    compare.add_argument(
        "--pretrained",
        "--ready",
        nargs="*",
        default=[],
        metavar="NAME",
        help="pretrained tokenizers to measure as well",
    )


def _add_tokenizer_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("tokenizer", metavar="TOKENIZER", help="saved file or name of a pretrained tokenizer")


def _add_train_options(train: argparse.ArgumentParser) -> None:
    add = train.add_argument
    add("files", nargs="+", metavar="FILES", help="files or glob patterns; ** matches folders of any depth")
    add("--out", required=True, metavar="PATH", help="file to save the tokenizer to")
    add("--vocab-size", metavar="N", help="total number of ids (default: 8192 unless --max-merges is given)")
    add("--k-bases", metavar="N", help="number of common short words to take as base tokens")
    add("--max-merges", metavar="N", help="maximum number of merges to learn")
    add("--min-freq", default=2, metavar="N", help="occurrences that an entry needs (default: 2)")
    add("--score", default="freq", help="ranking of merges: freq, freq_pmi or pmi (default: freq)")
    add("--boundaries", default="words", help="where merges stop: words or spaces (default: words)")
    add("--phrases", default=0.0, metavar="SHARE", help="share of entries that span words (default: 0)")
    add("--cased", action="store_true", help="keep upper case in the entries instead of using case marks")
    add("--portable", action="store_true", help="segment as a stock tokenizer.json does (no case marks, no phrases)")
    add("--byte-limit", default=4, metavar="N", help="maximum bytes of a base token (default: 4)")
    add("--processes", default=1, metavar="N", help="processes that count, with the same result (default: 1)")
    add("--note", default="", help="line to store in the file, for example about the text")
