"""The command line: python -m tokenizer train | encode | decode | inspect | compare | serve"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import time
from pathlib import Path

from tokenizer import HybridTokenizer, TokenizerError, pretrained_names
from tokenizer.arguments import parse
from tokenizer.learning.text_files import decode_utf8, read_text
from tokenizer.streams import discard_unwritable_output, print_last

_MAX_EXPANSION = 2**25
"""Ids that the counts of `decode` may add: a short line could stand for more ids than fit into memory."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk that standard output goes to


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line without the program's name; by default, `sys.argv`.

    Returns:
        The exit status: 0, 2 for invalid usage or data (one line on stderr), 130 for Ctrl-C.
    """
    try:
        options = parse(arguments)
        _COMMANDS[options.command](options)
        sys.stdout.flush()
    except TokenizerError as error:
        print_last(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        print_last("stopped")
        return 130
    except BrokenPipeError:  # the reader of the output has exited, for example `head`
        return 0
    except OSError as error:  # those of files are TokenizerErrors
        place = "cannot write to standard output: " if error.errno in _FULL else ""
        print_last(f"error: {place}{error.strerror or error}")
        return 2
    finally:
        discard_unwritable_output()
    return 0


def _load(name: str) -> HybridTokenizer:
    """Load a saved file or, if there is none of that name, a pretrained tokenizer."""
    if Path(name).exists():
        return HybridTokenizer.load(name)
    if name in pretrained_names():
        return HybridTokenizer.pretrained(name)
    available = ", ".join(pretrained_names()) or "none"
    raise TokenizerError(f"no file and no pretrained tokenizer is named {name!r} (pretrained: {available})")


def _read_input(file: str) -> str:
    if file == "-":
        try:
            data = sys.stdin.buffer.read()
        except OSError as error:
            raise TokenizerError(f"cannot read standard input: {error.strerror or error}") from None
        return decode_utf8(data, "standard input")
    return read_text(file)


class _ProgressLine:
    """A line on stderr, updated at most four times a second; silent if stderr is not a terminal."""

    def __init__(self) -> None:
        self._last = 0.0
        self._is_shown = sys.stderr.isatty()

    def __call__(self, description: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._is_shown and (now - self._last > 0.25 or done == total):
            self._last = now
            print(f"\r{description}: {done} of {total}\x1b[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Erase the line."""
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _train(options: argparse.Namespace) -> None:
    # Check the target first: training can take minutes.
    folder = Path(options.out).absolute().parent
    if not folder.is_dir():
        raise TokenizerError(f"the folder {folder} of --out does not exist: create it first")
    if not os.access(folder, os.W_OK):
        raise TokenizerError(f"the folder {folder} of --out cannot be written to: name another one")
    if not options.out or Path(options.out).is_dir():
        raise TokenizerError(f"--out {options.out!r} is not a file name: give one, such as my.hybtok")
    tokenizer = HybridTokenizer(not options.cased, options.byte_limit, options.portable)
    progress = _ProgressLine()
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
    progress.clear()
    tokenizer.save(options.out)
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    print(f"{options.out}: {tokenizer.vocab_size} ids learned from {count}")


def _encode(options: argparse.Namespace) -> None:
    tokenizer = _load(options.tokenizer)
    text = _read_input(options.file)
    if options.mode == "rle":
        print(*(f"{id_}:{count}" for id_, count in tokenizer.encode(text, mode="rle")))
    else:
        print(*tokenizer.encode(text))


def _decode(options: argparse.Namespace) -> None:
    tokenizer = _load(options.tokenizer)
    pairs = _parse_pairs(_read_input(options.file).split())
    added = 0
    for id_, count in pairs:
        if count < 1:
            raise TokenizerError(f"{id_}:{count}: a count must be 1 or more")
        added += count - 1
    if added > _MAX_EXPANSION:
        raise TokenizerError(f"the counts add {added:,} ids to the ones written: the maximum is {_MAX_EXPANSION:,}")
    text = tokenizer.decode([id_ for id_, count in pairs for _ in range(count)])
    sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass"))


def _parse_pairs(words: list[str]) -> list[tuple[int, int]]:
    pairs = []
    for word in words:
        id_, _, count = word.partition(":")
        try:
            pairs.append((int(id_), int(count or 1)))
        except ValueError:
            raise TokenizerError("decode reads ids (integers) or id:count pairs, separated by white space") from None
    return pairs


def _inspect(options: argparse.Namespace) -> None:
    tokenizer = _load(options.tokenizer)
    if options.token is None and options.text is None:
        print(tokenizer)
        print(tokenizer.db_status(options.preview))
    if options.merges:
        print(tokenizer.top_merges(options.merges))
    if options.token is not None:
        _explain(tokenizer, options.token)
    if options.text is not None:
        print(tokenizer.segment(options.text))


def _explain(tokenizer: HybridTokenizer, token: str) -> None:
    is_id = token.isdecimal() and token not in tokenizer.token2id
    if is_id and len(token) > 9:  # int() refuses strings of thousands of digits
        raise TokenizerError("--token has more than 9 digits: no id has as many")
    explanation = tokenizer.explain_token(int(token) if is_id else token)
    if explanation.id is None:
        print(f"{token!r} is not one token, but encoded as {len(explanation.parts)}:")
    print(explanation)


def _compare(options: argparse.Namespace) -> None:
    from tokenizer.inspect.compare import compare, format_table

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    print(format_table(compare(options.files, options.vocab_size, options.pretrained)))


def _serve(options: argparse.Namespace) -> None:
    from tokenizer.inspect.server import serve

    names = list(dict.fromkeys(options.tokenizers)) or pretrained_names()
    if not names:
        raise TokenizerError("this installation has no pretrained tokenizers: name a file")
    loaded = {name: _load(name) for name in options.tokenizers}  # reports errors right away

    def load(name: str) -> HybridTokenizer:
        return loaded[name] if name in loaded else _load(name)

    serve(names, load, options.port)


_COMMANDS = {
    "train": _train,
    "encode": _encode,
    "decode": _decode,
    "inspect": _inspect,
    "compare": _compare,
    "serve": _serve,
}


if __name__ == "__main__":
    sys.exit(main())
