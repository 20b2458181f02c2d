"""Chat templates of published models, with the ids that `apply_chat_template` of transformers gives."""

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from slm_jax.chat.messages import EncodedChat, Message, normalized
from slm_jax.chat.protection import Guard, Protection
from slm_jax.utils.errors import UserError

if TYPE_CHECKING:  # needs the package tokenizers, an extra
    from slm_jax.utils.foreign_tokenizer import ForeignTokenizer

_PROBE = (Message("user", "Question"), Message("assistant", "Response"))
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_TRAINING_DATE = datetime(2026, 1, 1)
"""The date that templates read in training data, whose ids must not depend on the day; prompts have the present one."""
Span = tuple[int, int]


class ForeignTemplate:
    """The chat template of a published model.

    Attributes:
        source: The Jinja template.
        stop_ids: The token after a response, if the template writes one, and those of the tokenizer.
    """

    def __init__(self, tokenizer: "ForeignTokenizer"):
        """Compile the template and encode a short conversation with it.

        Raises:
            UserError: There is no template, it is not valid, or it cannot express a question and a response.
        """
        from slm_jax.chat.sandbox import compile_template  # imports jinja2

        config = _json_file(tokenizer.files, "tokenizer_config.json")
        self.source = _template_source(tokenizer.files, config)
        self._tokens = _named_tokens({**_json_file(tokenizer.files, "special_tokens_map.json"), **config})
        try:
            self._environment, self._template = compile_template(self.source)
        except Exception as error:  # errors of jinja2, and of Python for what is nested too deeply
            raise UserError(f"the tokenizer's chat template is not valid: {error}") from None
        self._lock = threading.Lock()  # rendering changes the environment
        self._protection = Protection(tokenizer, self.source)
        end = self._end_of_turn()
        self.stop_ids: Sequence[int] = list(dict.fromkeys([*([] if end is None else [end]), *tokenizer.stop_ids]))

    def encode(self, messages: Sequence[Message], generation_prompt: bool = False) -> EncodedChat:
        """Encode a conversation; see `slm_jax.chat.template.ChatTemplate.encode`.

        With a generation prompt, no token is marked as predicted.
        """
        turns = normalized(messages)
        now = None if generation_prompt else _TRAINING_DATE
        guard = self._protection.guard(turns)
        written = self._rendered(guard.messages, generation_prompt, now)[0]
        names = self._protection.names_in(written)
        harmless = self._protection.harmless(turns)
        if harmless and self._protection.names_in(self._rendered(harmless, generation_prompt, now)[0]) != names:
            raise UserError(
                "a message and the tokenizer's chat template together form the name of a special token: remove its "
                "parts from the message"
            )
        text, spans = self._render(guard, len(messages), generation_prompt, now)
        ids, offsets = guard.encode(text)
        if not self._protection.recognizes(ids, names):  # the tokenizer normalizes a text to a name
            guard.rename()
            text, spans = self._render(guard, len(messages), generation_prompt, now)
            ids, offsets = guard.encode(text)
        predicted = np.zeros(len(ids), bool)
        if not generation_prompt:
            for start, end in spans or self._spans(guard, text, ids, offsets):
                predicted |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        return EncodedChat(ids, predicted)

    def _render(
        self, guard: Guard, count: int, generation_prompt: bool, now: datetime | None = _TRAINING_DATE
    ) -> tuple[str, list[Span]]:
        """Return the restored text of the first messages, and the spans in it that the template marks as generated."""
        text, marked = self._rendered(guard.messages[:count], generation_prompt, now)
        spans = [(len(guard.restore(text[:start])), len(guard.restore(text[:end]))) for start, end in marked]
        return guard.restore(text), spans

    def _rendered(
        self, messages: Sequence[Message], generation_prompt: bool, now: datetime | None
    ) -> tuple[str, list[Span]]:
        """Return the text that the template writes, and the spans that it marks.

        Raises:
            UserError: The template refuses the messages.
        """
        variables = {
            **self._tokens,
            "messages": [message._asdict() for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }
        with self._lock:
            try:
                return self._environment.render(self._template, variables, now), self._environment.spans
            except Exception as error:  # whatever a program of somebody else raises
                raise UserError(f"the tokenizer's chat template refuses the conversation: {error}") from None

    def _spans(self, guard: Guard, text: str, ids: np.ndarray, offsets: np.ndarray) -> list[Span]:
        """Return the spans of assistant turns in the text of messages, found by rendering the beginnings of it.

        A turn starts where the text departs from that of the prompt for it, and ends after the first token that ends
        a response.

        Raises:
            UserError: The text of a turn depends on later ones in a way that hides where it starts or ends.
        """
        spans = []
        for number, message in enumerate(guard.messages):
            if message.role != "assistant":
                continue
            start = self._start_of_turn(guard, number, text)
            whole = self._render(guard, number + 1, False)[0]
            is_prefix = text.startswith(whole) and len(whole) >= start
            limit = len(whole) if is_prefix else len(text)
            is_end = np.isin(ids, self.stop_ids) & (offsets[:, 0] >= start) & (offsets[:, 1] <= limit)
            if not is_end.any() and not is_prefix:
                raise _hidden_span(number)
            spans.append((start, int(offsets[np.argmax(is_end), 1]) if is_end.any() else limit))
        return spans

    def _start_of_turn(self, guard: Guard, number: int, text: str) -> int:
        """Return the position in a text at which the assistant's turn starts that is a message with a number."""
        if number == 0:
            return 0
        before = self._render(guard, number, False)[0]
        prompt = self._render(guard, number, True)[0]
        start = _common_length(prompt, text)
        if start < len(before) or not prompt.startswith(before):
            raise _hidden_span(number)
        return start

    def _end_of_turn(self) -> int | None:
        """Return the id of the token that the template writes after a response, None if there is none."""
        guard = self._protection.guard(_PROBE)
        text, _ = self._render(guard, len(_PROBE), False)
        response = _PROBE[-1].content
        position = text.rfind(response)
        if position < 0:
            raise UserError("the tokenizer's chat template leaves the response out: it cannot be trained or served")
        ids, offsets = guard.encode(text)
        after = ids[offsets[:, 0] >= position + len(response)].tolist()
        return next((id_ for id_ in after if id_ in self._protection.named_ids), None)


def _common_length(a: str, b: str) -> int:
    """Return the length of the longest common beginning of two texts."""
    different = (index for index, (left, right) in enumerate(zip(a, b, strict=False)) if left != right)
    return next(different, min(len(a), len(b)))


def _hidden_span(number: int) -> UserError:
    return UserError(
        f"the tokenizer's chat template writes the conversation before message {number + 1} differently once more "
        "messages follow, so which tokens are the assistant's is unknown: train on conversations of two messages, or "
        "mark responses in the template with {% generation %}"
    )


def _template_source(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str:
    """Return the template: that of its own file, else of the tokenizer's config, where "default" is one of several."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", "replace")
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise UserError(
            "the tokenizer has no chat template: take the tokenizer of the model's instruction-tuned version, or add a "
            "chat_template.jinja to its folder"
        )
    return source


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of special tokens that a template may use, by their role."""
    tokens = {}
    for role in _TOKENS:
        value = config.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[role] = text
    return tokens


def _json_file(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} of the tokenizer is damaged: {error}") from None
    return value if isinstance(value, dict) else {}
