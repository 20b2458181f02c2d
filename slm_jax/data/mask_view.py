"""Show which tokens of a document are predicted: highlighted on a terminal, between marks elsewhere."""

import os
from collections.abc import Iterator
from typing import IO

import numpy as np

from slm_jax.data.corpus.stream import TokenStream
from slm_jax.data.turns import boundary_ids
from slm_jax.utils.text_tokenizer import TextTokenizer, decode_continuation

_GREEN, _RESET = "\x1b[32m", "\x1b[0m"
_MARKS = ("[[", "]]")


def uses_color(stream: IO[str]) -> bool:
    """Return whether to color what is written to a stream: a terminal, unless NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def legend(color: bool) -> str:
    """Return the line that explains the highlighting."""
    return f"predicted tokens are {'green' if color else f'between {_MARKS[0]} and {_MARKS[1]}'}:"


def masked_lines(
    stream: TokenStream, start: int, stop: int, tokenizer: TextTokenizer, color: bool = False
) -> Iterator[str]:
    """Yield the lines of a text whose predicted tokens are highlighted, and whose special tokens have their names.

    Args:
        stream: The stream.
        start: The first token.
        stop: The token after the last.
        tokenizer: The tokenizer.
        color: Highlight by color instead of marks.
    """
    ids = stream[start:stop]
    prompt = stream.prompt_mask(start, stop)
    predicted = np.ones(ids.size, bool) if prompt is None else ~prompt
    before, after = (_GREEN, _RESET) if color else _MARKS
    is_boundary = np.isin(ids, list(boundary_ids(tokenizer)))
    changes = np.flatnonzero(predicted[1:] != predicted[:-1]) + 1
    text = ""
    for run, special in zip(np.split(ids, changes), np.split(is_boundary, changes), strict=True):
        shown = _shown(run, special, tokenizer)
        if predicted[0]:
            # Colors end with each line, so that a pager or a cut does not spread them.
            shown = (
                "\n".join(f"{before}{line}{after}" for line in shown.split("\n")) if color else before + shown + after
            )
        text += shown
        predicted = predicted[run.size :]
    yield from text.split("\n")


def _shown(ids: np.ndarray, is_boundary: np.ndarray, tokenizer: TextTokenizer) -> str:
    """Return the text of ids that a terminal can show, with the names of special tokens."""
    changes = np.flatnonzero(is_boundary[1:] | is_boundary[:-1]) + 1
    parts = []
    for run, special in zip(np.split(ids, changes), np.split(is_boundary, changes), strict=True):
        if special[0]:
            parts.append(tokenizer.id2token[int(run[0])])
        else:
            text = decode_continuation(tokenizer, [], run.tolist())
            parts.append("".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text))
    return "".join(parts)
