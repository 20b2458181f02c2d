"""python -m tokenizer train | encode | decode | inspect | compare | serve"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tokenizer import HybridTokenizer, TokenizerError, pretrained_names

DESCRIPTION = """\
Learn a tokenizer from text, encode and decode with it, look inside, compare it with others.

  python -m tokenizer train 'books/**/*.txt' --out my.hybtok --vocab-size 8192
  echo 'Hello, world!' | python -m tokenizer encode my.hybtok
  echo 'Hello, world!' | python -m tokenizer encode my.hybtok | python -m tokenizer decode my.hybtok
  python -m tokenizer inspect my.hybtok --text 'Hello, world!' --merges 20
  python -m tokenizer compare my_text.txt
  python -m tokenizer serve

TOKENIZER is a saved file or the name of a ready-made one:
{names}.
"""

TRAIN = """\
Learn a vocabulary from UTF-8 text files and save it as one file.

  python -m tokenizer train 'books/**/*.txt' --out my.hybtok
  python -m tokenizer train a.txt b.txt --out my.hybtok --vocab-size 32768 --processes 4

Quote patterns, so that the shell leaves ** to this program. 8192 ids suit a few MB of text, 32768
some 50 MB and more. Then use it: --tokenizer.path my.hybtok in training,
HybridTokenizer.load("my.hybtok") in Python.
"""
ENCODE = """\
Write a text as ids.

  echo 'Hello, world!' | python -m tokenizer encode english-16k
  python -m tokenizer encode my.hybtok book.txt > book.ids
  python -m tokenizer encode my.hybtok --mode rle table.txt      (id:count for runs of one id)
"""
DECODE = """\
Turn ids back into the text they were made from, exactly.

  echo 'Hello, world!' | python -m tokenizer encode my.hybtok | python -m tokenizer decode my.hybtok
  python -m tokenizer decode my.hybtok book.ids > book.txt
"""
INSPECT = """\
Show what a tokenizer holds, how it cuts a text and how its tokens are made.

  python -m tokenizer inspect english-16k                            (special tokens, first entries)
  python -m tokenizer inspect english-16k --text 'Hello, world!'     (each token: kind and text)
  python -m tokenizer inspect english-16k --token ' welcome'         (its parts, down to the bytes)
  python -m tokenizer inspect english-16k --merges 20                (the most used ones)

A space belongs to the word after it: ' the' and 'the' are two tokens.
"""
COMPARE = """\
Learn from nine tenths of the files with this tokenizer and, where they are installed, with Hugging
Face tokenizers, tiktoken and sentencepiece; print bytes per token and speed on the rest. More bytes
per token means fewer tokens for the same text.

  python -m tokenizer compare my_text.txt
  python -m tokenizer compare 'books/*.txt' --vocab-size 16384 --ready english-16k

Speed needs about 2 MB of text or more; of less, only the bytes per token are told.
"""

SERVE = """\
A page on which text is cut into tokens while you type: their kinds, ids and parts, bytes per token,
and two vocabularies side by side. It is served to this machine only, until Ctrl-C.

  python -m tokenizer serve                        (the ready-made vocabularies)
  python -m tokenizer serve my.hybtok english-16k  (these)
"""


_MOST_ADDED = 2**25
"""Ids that counts may add in `decode`, where a short line could stand for more than fits into memory."""


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    names = ", ".join(pretrained_names()) or "none in this installation"
    parser = argparse.ArgumentParser(
        "python -m tokenizer", description=DESCRIPTION.format(names=names), formatter_class=style
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", description=TRAIN, formatter_class=style, help="learn a vocabulary from UTF-8 text files"
    )
    train.add_argument("files", nargs="+", metavar="FILES", help="files or glob patterns; ** reaches all folders below")
    train.add_argument("--out", required=True, metavar="PATH", help="where to save the tokenizer")
    train.add_argument("--vocab-size", type=int, metavar="N", help="ids in all (8192 unless --max-merges is given)")
    train.add_argument("--k-bases", type=int, metavar="N", help="take so many common short words as base tokens")
    train.add_argument("--max-merges", type=int, metavar="N", help="learn at most so many merges")
    train.add_argument("--min-freq", type=int, default=2, metavar="N", help="occurrences that an entry needs (2)")
    train.add_argument("--score", default="freq", help="how merges are ranked: freq, freq_pmi or pmi (freq)")
    train.add_argument("--boundaries", default="words", help="where merges stop: words or spaces (words)")
    train.add_argument(
        "--phrases", type=float, default=0.0, metavar="SHARE", help="share of entries that span words (0)"
    )
    train.add_argument("--cased", action="store_true", help="keep upper case in the entries instead of case marks")
    train.add_argument("--byte-limit", type=int, default=4, metavar="N", help="bytes of the longest base token (4)")
    train.add_argument("--processes", type=int, default=1, metavar="N", help="processes that count (1); same result")
    train.add_argument("--note", default="", help="a line kept in the file, for example about the text")

    encode = commands.add_parser(
        "encode", description=ENCODE, formatter_class=style, help="text to ids, separated by spaces"
    )
    encode.add_argument("tokenizer", metavar="TOKENIZER")
    encode.add_argument("file", nargs="?", default="-", metavar="FILE", help="UTF-8 text; standard input by default")
    encode.add_argument("--mode", choices=("flat", "rle"), default="flat", help="ids, or id:count for runs of one id")

    decode = commands.add_parser("decode", description=DECODE, formatter_class=style, help="ids (or id:count) to text")
    decode.add_argument("tokenizer", metavar="TOKENIZER")
    decode.add_argument("file", nargs="?", default="-", metavar="FILE", help="ids; standard input by default")

    inspect = commands.add_parser(
        "inspect", description=INSPECT, formatter_class=style, help="what a tokenizer holds and how it cuts a text"
    )
    inspect.add_argument("tokenizer", metavar="TOKENIZER")
    inspect.add_argument("--text", help="show the tokens of this text")
    inspect.add_argument("--token", help="explain this token (its text or its id)")
    inspect.add_argument("--merges", type=int, default=0, metavar="N", help="show the N most used merges")
    inspect.add_argument("--preview", type=int, default=10, metavar="N", help="entries shown (10)")

    compare = commands.add_parser(
        "compare",
        description=COMPARE,
        formatter_class=style,
        help="bytes per token and speed beside other installed tokenizers",
    )
    compare.add_argument("files", nargs="+", metavar="FILES", help="files or glob patterns of UTF-8 text")
    compare.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="entries that each learns (8192)")
    compare.add_argument("--ready", nargs="*", default=[], metavar="NAME", help="also measure these ready-made ones")

    serve = commands.add_parser("serve", description=SERVE, formatter_class=style, help="a page to try tokenizers on")
    serve.add_argument("tokenizers", nargs="*", metavar="TOKENIZER", help="files or names; the ready-made by default")
    serve.add_argument("--port", type=int, default=8765, metavar="N", help="of the loopback interface (8765)")
    return parser


def _load(name: str) -> HybridTokenizer:
    if not Path(name).exists() and name in pretrained_names():
        return HybridTokenizer.pretrained(name)
    if not Path(name).exists():
        ready = ", ".join(pretrained_names()) or "none"
        raise TokenizerError(f"there is no file {name!r} and no ready-made tokenizer of that name (there are: {ready})")
    return HybridTokenizer.load(name)


def _read(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise TokenizerError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is not UTF-8 text (byte {error.start})") from None


class _Progress:
    """A line on standard error, renewed at most four times a second, where that is a terminal."""

    def __init__(self) -> None:
        self._last = 0.0
        self._shown = sys.stderr.isatty()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._shown and (now - self._last > 0.25 or done == total):
            self._last = now
            print(f"\r{what}: {done} of {total}\x1b[K", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _train(options: argparse.Namespace) -> None:
    folder = Path(options.out).absolute().parent
    if not folder.is_dir():
        raise TokenizerError(f"the folder {folder} of --out does not exist: make it first")
    if not options.out or Path(options.out).is_dir():
        raise TokenizerError(f"--out {options.out!r} is no name of a file: give one, such as my.hybtok")
    tokenizer = HybridTokenizer(lowercase=not options.cased, byte_limit=options.byte_limit)
    progress = _Progress()
    files = tokenizer.add_files(options.files, processes=options.processes, progress=progress)
    tokenizer.freeze_vocab(
        options.k_bases,
        options.max_merges,
        vocab_size=options.vocab_size,
        min_freq=options.min_freq,
        score=options.score,
        phrases=options.phrases,
        boundaries=options.boundaries,
        note=options.note,
        progress=progress,
    )
    progress.end()
    tokenizer.save(options.out)
    print(f"{options.out}: {tokenizer.vocab_size} ids learned from {len(files)} file{'s' * (len(files) > 1)}")


def _decode(options: argparse.Namespace) -> None:
    tokenizer = _load(options.tokenizer)
    words = _read(options.file).split()
    try:
        pairs = [(int(id_), int(count or 1)) for id_, _, count in (word.partition(":") for word in words)]
    except ValueError:
        raise TokenizerError("decode reads ids (whole numbers) or id:count, separated by white space") from None
    if wrong := [f"{id_}:{count}" for id_, count in pairs if count < 1]:
        raise TokenizerError(f"{wrong[0]}: a count must be 1 or more")
    if (added := sum(count - 1 for _, count in pairs)) > _MOST_ADDED:
        raise TokenizerError(f"the counts add {added:,} ids to those that are written: {_MOST_ADDED:,} are the most")
    text = tokenizer.decode([id_ for id_, count in pairs for _ in range(count)])
    sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass"))


def _encode(options: argparse.Namespace) -> None:
    tokenizer, text = _load(options.tokenizer), _read(options.file)
    if options.mode == "rle":
        print(*(f"{id_}:{count}" for id_, count in tokenizer.encode(text, mode="rle")))
    else:
        print(*tokenizer.encode(text))


def _inspect(options: argparse.Namespace) -> None:
    tokenizer = _load(options.tokenizer)
    if options.token is None and options.text is None:
        print(tokenizer)
        print(tokenizer.db_status(options.preview))
    if options.merges:
        print(tokenizer.top_merges(options.merges))
    if options.token is not None:
        known = options.token in tokenizer.token2id or not options.token.isdecimal()
        if not known and len(options.token) > 9:  # int refuses thousands of digits
            raise TokenizerError("--token has more than 9 digits, which no id has")
        explained = tokenizer.explain_token(options.token if known else int(options.token))
        if explained.id is None:
            print(f"{options.token!r} is not one token, but is written with {len(explained.parts)}:")
        print(explained)
    if options.text is not None:
        print(tokenizer.segment(options.text))


def _compare(options: argparse.Namespace) -> None:
    from tokenizer.inspect.compare import compare, table

    print(table(compare(options.files, options.vocab_size, options.ready, lambda line: print(line, file=sys.stderr))))


def _serve(options: argparse.Namespace) -> None:
    from tokenizer.inspect.playground import serve

    names = list(dict.fromkeys(options.tokenizers)) or pretrained_names()
    if not names:
        raise TokenizerError("there are no ready-made tokenizers in this installation: name a file")
    loaded = {name: _load(name) for name in options.tokenizers}  # what is wrong with them is told now
    serve(names, lambda name: loaded.get(name) or _load(name), options.port)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a mistake of the user, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    run = {"train": _train, "encode": _encode, "decode": _decode, "inspect": _inspect, "compare": _compare}
    run["serve"] = _serve
    try:
        run[options.command](options)
        sys.stdout.flush()
    except TokenizerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
