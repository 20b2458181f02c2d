"""Texts as a model met them in training: a document begins behind an <EOS> and ends with one.

A sentence or a context is taken for the beginning of a document, as `encode_prompt` of generate.py does: <EOS> stands
before it and is given, not scored; none is scored behind it, for nothing says that the document ends there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.evaluation.scoring import Item
from tokenizer import HybridTokenizer


def begin(tokenizer: HybridTokenizer, *parts: np.ndarray) -> np.ndarray:
    """int32: <EOS> and the parts behind it."""
    return np.concatenate([np.array([tokenizer.token2id["<EOS>"]], np.int32), *parts])


def sentences(tokenizer: HybridTokenizer, texts: Sequence[str]) -> list[Item]:
    """Each text scored from its first token on."""
    return [Item(begin(tokenizer, ids)) for ids in tokenizer.encode_arrays(texts)]


class Continuations(NamedTuple):
    """Continuations to be scored, given their contexts."""

    items: list[Item]
    split: int  # of how many the tokens are not those of the text encoded at once


def continuations(tokenizer: HybridTokenizer, pairs: Sequence[tuple[str, str]]) -> Continuations:
    """(context, continuation) pairs, of which the continuation is scored, all its tokens.

    Context and continuation are encoded apart, as a prompt and what is written after it are. White space between them
    belongs to the continuation (" word" is one piece for the tokenizer), wherever the pair has it. These are the tokens
    of the whole text, unless the tokenizer has phrases (tokens that span words) or the border lies within a word.
    """
    cut = [len(context.rstrip(" \n")) for context, _ in pairs]
    contexts = [context[:at] for (context, _), at in zip(pairs, cut, strict=True)]
    rests = [context[at:] + rest for (context, rest), at in zip(pairs, cut, strict=True)]
    arrays = [tokenizer.encode_arrays(texts) for texts in (contexts, rests, [a + b for a, b in pairs])]
    items, split = [], 0
    for context_ids, ids, whole_ids in zip(*arrays, strict=True):
        item = Item(begin(tokenizer, context_ids, ids), 1 + len(context_ids))
        split += not np.array_equal(item.ids[1:], whole_ids)
        items.append(item)
    return Continuations(items, split)


def num_bytes(text: str) -> int:
    """Its length in UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))
