"""The chat settings of an export: the template, the tokens that end a response, and what makes texts of users safe.

Only models that were trained on conversations get them. Those of a base model have never been trained, and a chat
template makes programs offer a chat. It also needs a tokenizer that recognizes the names of special tokens in any text.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slm_jax.chat.messages import Message
from slm_jax.chat.own_template import ESCAPE
from slm_jax.chat.sandbox import compile_template
from slm_jax.chat.template import ChatTemplate
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer
from tokenizer import HybridTokenizer

CHAT_TEMPLATE = "chat_template.jinja"


def stop_ids(tokenizer: TextTokenizer, is_chat: bool) -> list[int]:
    """Return the ids that end a generated text: with chat settings, the end of a turn first."""
    return list(ChatTemplate.of(tokenizer).stop_ids if is_chat else tokenizer.stop_ids)


def add_chat(content: dict[str, Any], tokenizer: HybridTokenizer) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json`` that encodes rendered conversations.

    Names of special tokens are recognized. In the contents of a conversation, the template puts an escape after each
    "<", so that there are no names; it is removed after names have been searched for.
    """
    added = [
        {
            "id": id_,
            "content": tokenizer.id2token[id_],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for id_ in tokenizer.vocabulary.special_ids
    ]
    normalizer = {"type": "Replace", "pattern": {"String": f"<{ESCAPE}"}, "content": "<"}
    return {**content, "added_tokens": added, "normalizer": normalizer}


def verify_chat(tokenizer: HybridTokenizer, path: Path, texts: Sequence[str]) -> int:
    """Compare the ids of conversations, rendered and encoded as other programs do it, with those of the run.

    Args:
        tokenizer: The tokenizer.
        path: The ``tokenizer.json`` with chat settings.
        texts: Texts without lone surrogates, of which conversations are made.

    Returns:
        The number of conversations.

    Raises:
        UserError: A conversation has other ids.
    """
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(path))
    template = ChatTemplate.of(tokenizer)
    environment, compiled = compile_template(template.source)
    count = 0
    for messages in _conversations(tokenizer, texts):
        variables = {
            "messages": [message._asdict() for message in messages],
            "bos_token": tokenizer.id2token[tokenizer.start_id],
            "add_generation_prompt": messages[-1].role == "user",
        }
        ids = theirs.encode(environment.render(compiled, variables), add_special_tokens=False).ids
        own = template.encode(messages, messages[-1].role == "user").ids.tolist()
        if ids != own:
            raise UserError(
                f"{path.name} does not match the run's tokenizer: the conversation {str(messages)[:160]} has the ids "
                f"{ids[:20]} there, {own[:20]} here; please report this, with the versions of slm_jax and tokenizers"
            )
        count += 1
    return count


def _conversations(tokenizer: HybridTokenizer, texts: Sequence[str]) -> Iterator[list[Message]]:
    """Yield conversations of all texts, and of texts with names of special tokens and escapes in them."""
    names = [tokenizer.id2token[id_] for id_ in tokenizer.vocabulary.special_ids]
    source = random.Random(1)
    pieces = [*names, *names, "<", ESCAPE, "<" + ESCAPE, "|>", "{{", "%}", *texts]
    mixed = ["".join(source.choices(pieces, k=source.randrange(1, 8))) for _ in range(100)]
    for text in (*texts, *mixed):
        yield [Message("user", text)]
        yield [Message("system", text), Message("user", "Hi"), Message("assistant", text), Message("user", text)]
        yield [Message("user", text), Message("assistant", text)]
