"""The project's turn format, for its own tokenizers.

A conversation is ``<EOS>``, then for each message the token of its role, the ids of its content, and the end token.
Contents are encoded on their own, so no text can produce a turn token and the tokens at a border never depend on the
neighbor.
"""

from collections.abc import Sequence

import numpy as np

from slm_jax.chat.messages import EncodedChat, Message, check_order, normalized
from tokenizer import HybridTokenizer

ESCAPE = "\ufdd0"
"""Noncharacter that the template puts after each "<" of a content; the normalizer of exported tokenizers removes it."""

# Whoever renders this as one string (transformers) gets the ids of `OwnTemplate.encode`: no content contains the name
# of a special token, since each "<" in it is followed by the escape.
_SOURCE = """\
{%- set names = {'system': '@system@', 'user': '@user@', 'assistant': '@assistant@'} -%}
{%- set state = namespace(expected='user') -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
  {%- if message['content'] is not string -%}
    {{- raise_exception('the content of a message must be a text') -}}
  {%- endif -%}
  {%- if role == 'system' and loop.first -%}
    {{- names[role] + message['content']@protect@ + '@end@' -}}
  {%- elif role != state.expected -%}
    {{- raise_exception('an optional system message is first, then user and assistant take turns') -}}
  {%- elif role == 'user' -%}
    {%- set state.expected = 'assistant' -%}
    {{- names[role] + message['content']@protect@ + '@end@' -}}
  {%- else -%}
    {%- set state.expected = 'user' -%}
    {{- names[role] -}}
    @generation@
    {{- message['content']@protect@ + '@end@' -}}
    @endgeneration@
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- names['assistant'] -}}
{%- endif -%}
"""


class OwnTemplate:
    """The turn format with a tokenizer of the project.

    Attributes:
        source: The same format as a Jinja template, for other programs.
        stop_ids: The end token and ``<EOS>``.
    """

    def __init__(self, tokenizer: HybridTokenizer):
        self._tokenizer = tokenizer
        self._turns = tokenizer.turn_ids
        self.stop_ids: Sequence[int] = (self._turns.end, tokenizer.eos_id)
        self.source = template_source(tokenizer)

    def encode(self, messages: Sequence[Message], generation_prompt: bool = False) -> EncodedChat:
        """Encode a conversation; see `slm_jax.chat.template.ChatTemplate.encode`."""
        turns = normalized(messages)
        check_order(turns, generation_prompt)
        parts: list[np.ndarray] = [np.array([self._tokenizer.start_id], np.int32)]
        predicted = [np.zeros(1, bool)]
        contents = self._tokenizer.encode_arrays([turn.content for turn in turns])
        for turn, content in zip(turns, contents, strict=True):
            role = getattr(self._turns, turn.role)
            parts += [np.array([role], np.int32), content, np.array([self._turns.end], np.int32)]
            predicted += [np.zeros(1, bool), np.full(len(content) + 1, turn.role == "assistant")]
        if generation_prompt:
            parts.append(np.array([self._turns.assistant], np.int32))
            predicted.append(np.zeros(1, bool))
        return EncodedChat(np.concatenate(parts).astype(np.int32), np.concatenate(predicted))


def template_source(tokenizer: HybridTokenizer, has_escapes: bool = True) -> str:
    """Return the Jinja template of the turn format.

    Args:
        tokenizer: The tokenizer.
        has_escapes: Whether the program that encodes the text removes the escapes of contents, and knows the tag
            ``{% generation %}`` (transformers). Otherwise (llama.cpp) the name of a special token in a content gets a
            space after its "<", and other contents stay as they are.
    """
    names = {name: tokenizer.id2token[id_] for name, id_ in tokenizer.turn_ids._asdict().items()}
    protect = f" | replace('<', '<{ESCAPE}')"
    if not has_escapes:
        special = [tokenizer.id2token[id_] for id_ in tokenizer.vocabulary.special_ids]
        protect = "".join(f" | replace('{name}', '< {name[1:]}')" for name in special)
    source = _SOURCE.replace("message['content']@protect@ +", f"(message['content']{protect}) +")
    for name in ("generation", "endgeneration"):
        source = source.replace(f"    @{name}@\n", f"    {{%- {name} -%}}\n" if has_escapes else "")
    for name, token in names.items():
        source = source.replace(f"@{name}@", token)
    return source
