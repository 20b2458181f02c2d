"""Token ids of texts in the form seen in training, where a document follows an <EOS> and ends with one.

Sentences and contexts are treated as the beginning of a document, as `encode_prompt` does for generation: they follow
an <EOS>, which is given and not scored. No <EOS> is scored after them, because nothing implies that the document ends
there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.evaluation.scoring import Item
from slm_jax.utils.text_tokenizer import TextTokenizer


def with_eos_prefix(tokenizer: TextTokenizer, *parts: np.ndarray) -> np.ndarray:
    """Return <EOS> followed by the concatenated parts, int32."""
    return np.concatenate([np.array([tokenizer.eos_id], np.int32), *parts])


def with_start(tokenizer: TextTokenizer, *parts: np.ndarray) -> np.ndarray:
    """Return the parts of a text after the id that begins it, <EOS> or another one of a foreign tokenizer, int32."""
    return np.concatenate([np.array([tokenizer.start_id], np.int32), *parts])


def sentence_items(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[Item]:
    """Return an item for each text with all of its tokens scored."""
    return [Item(with_start(tokenizer, ids)) for ids in tokenizer.encode_arrays(texts)]


class Continuations(NamedTuple):
    """Continuations to score given their contexts.

    Attributes:
        items: One item per (context, continuation) pair.
        num_resplit: Number of pairs whose tokens differ from those of the concatenated text.
    """

    items: list[Item]
    num_resplit: int


def continuation_items(tokenizer: TextTokenizer, pairs: Sequence[tuple[str, str]]) -> Continuations:
    """Return an item for each pair with all tokens of the continuation scored.

    The context is encoded as a prompt is. White space at the boundary is moved to the continuation, because " word" is
    one unit for the tokenizer. The tokens are those of the concatenated text if these begin with the tokens of the
    context: on its own, a continuation would get another space from SentencePiece. Else, with phrases (tokens that span
    words) or a boundary inside a word, the continuation is encoded separately, as a generated text may be.

    Args:
        tokenizer: The tokenizer of the model.
        pairs: (context, continuation) texts.
    """
    lengths = [len(context.rstrip(" \n")) for context, _ in pairs]
    contexts = [context[:length] for (context, _), length in zip(pairs, lengths, strict=True)]
    rests = [context[length:] + rest for (context, rest), length in zip(pairs, lengths, strict=True)]
    joint_texts = [context + rest for context, rest in pairs]
    encoded = [tokenizer.encode_arrays(texts) for texts in (contexts, rests, joint_texts)]
    items = []
    num_resplit = 0
    for context_ids, rest_ids, joint_ids in zip(*encoded, strict=True):
        continues = np.array_equal(joint_ids[: len(context_ids)], context_ids)
        num_resplit += not continues
        parts = [joint_ids] if continues else [context_ids, rest_ids]
        items.append(Item(with_start(tokenizer, *parts), 1 + len(context_ids)))
    return Continuations(items, num_resplit)


def num_bytes(text: str) -> int:
    """Return the length of a text in UTF-8 bytes."""
    return len(text.encode("utf-8", "surrogatepass"))
