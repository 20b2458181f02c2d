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
    {{- names[role] + message['content'] | replace('<', '<@escape@') + '@end@' -}}
  {%- elif role != state.expected -%}
    {{- raise_exception('an optional system message is first, then user and assistant take turns') -}}
  {%- elif role == 'user' -%}
    {%- set state.expected = 'assistant' -%}
    {{- names[role] + message['content'] | replace('<', '<@escape@') + '@end@' -}}
  {%- else -%}
    {%- set state.expected = 'user' -%}
    {{- names[role] -}}
    {%- generation -%}
    {{- message['content'] | replace('<', '<@escape@') + '@end@' -}}
    {%- endgeneration -%}
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
        names = {name: tokenizer.id2token[id_] for name, id_ in self._turns._asdict().items()}
        self.source = template_source(names)

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


def template_source(names: dict[str, str]) -> str:
    """Return the Jinja template of the turn format.

    Args:
        names: The names of the tokens "system", "user", "assistant" and "end".
    """
    source = _SOURCE.replace("@escape@", ESCAPE)
    for name, token in names.items():
        source = source.replace(f"@{name}@", token)
    return source
