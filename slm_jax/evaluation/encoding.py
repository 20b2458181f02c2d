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

    Context and continuation are encoded separately, as a prompt and the generated text are. White space at the boundary
    is moved to the continuation, because " word" is one unit for the tokenizer. The tokens equal those of the
    concatenated text unless the tokenizer has phrases (tokens that span words) or the boundary is inside a word.

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
        item = Item(with_start(tokenizer, context_ids, rest_ids), 1 + len(context_ids))
        if not np.array_equal(item.ids[1:], joint_ids):
            num_resplit += 1
        items.append(item)
    return Continuations(items, num_resplit)


def num_bytes(text: str) -> int:
    """Return the length of a text in UTF-8 bytes."""
    return len(text.encode("utf-8", "surrogatepass"))
