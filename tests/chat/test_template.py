"""The turn format of the project's own tokenizers, compared with its Jinja template and with a naive twin."""

import re

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.chat.messages import Message
from slm_jax.chat.own_template import ESCAPE
from slm_jax.chat.template import ChatTemplate
from slm_jax.utils.errors import UserError
from tests.test_tokenizer.samples import LANGUAGES
from tokenizer import HybridTokenizer, pretrained_names
from tokenizer.vocabulary import TURN_TOKENS

CONVERSATION = [
    Message("system", "Answer briefly."),
    Message("user", " What is <|user|>?\n"),
    Message("assistant", "<EOS> is the END; {{ 7 * 7 }}"),
    Message("user", ""),
]
NAMES = ["<EOS>", "<RES>", "<CLS>", "<|user|>", "<|end|>", "<|system|>", "<|assistant|>", "<0x0A>", "<UP>"]
PIECES = st.one_of(
    st.sampled_from([*NAMES, "{{", "}}", "{%", "%}", "<", "|>", ESCAPE, "\ud800", "\udfff", "\x00", "\x1b[1m", "\r\n"]),
    st.text(max_size=8),
)
CONTENTS = st.lists(PIECES, max_size=6).map("".join)


TURNS = {"new": TURN_TOKENS, "portable": TURN_TOKENS, "older": ("<CLS>", "<SEP>", "<MASK>", "<RES>")}


@pytest.fixture(scope="module", params=TURNS)
def tokenizer(request) -> HybridTokenizer:
    if request.param == "older":
        return HybridTokenizer.pretrained(pretrained_names()[0])
    tokenizer = HybridTokenizer(portable=request.param == "portable")
    tokenizer.add_text("".join(LANGUAGES.values()) * 4)
    tokenizer.freeze_vocab(vocab_size=500)
    return tokenizer


def turn_names(tokenizer: HybridTokenizer) -> dict[str, str]:
    names = TURNS["new"] if "<|user|>" in tokenizer.token2id else TURNS["older"]
    return dict(zip(("system", "user", "assistant", "end"), names, strict=True))


def naive(tokenizer: HybridTokenizer, messages, generation_prompt=False) -> tuple[list[int], list[bool]]:
    names = turn_names(tokenizer)
    ids, predicted = [tokenizer.token2id["<EOS>"]], [False]
    for role, content in messages:
        own = [*tokenizer.encode(content), tokenizer.token2id[names["end"]]]
        ids += [tokenizer.token2id[names[role]], *own]
        predicted += [False, *[role == "assistant"] * len(own)]
    if generation_prompt:
        ids.append(tokenizer.token2id[names["assistant"]])
        predicted.append(False)
    return ids, predicted


def render(source: str, messages, generation_prompt=False) -> str:
    """The string that transformers renders; its own tag is removed, which it only needs for masks."""
    source = re.sub(r"\{%-? (end)?generation -?%\}", "{#- -#}", source)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)

    def fail(message: str):
        raise jinja2.TemplateError(message)

    return environment.from_string(source).render(
        messages=[message._asdict() for message in messages],
        bos_token="<EOS>",
        add_generation_prompt=generation_prompt,
        raise_exception=fail,
    )


def ids_of_rendered(tokenizer: HybridTokenizer, text: str) -> list[int]:
    """Return the ids of a tokenizer that looks for special tokens first and then removes escapes."""
    special = {tokenizer.id2token[id_]: id_ for id_ in tokenizer.vocabulary.special_ids}
    parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
    ids = [[special[part]] if part in special else tokenizer.encode(part.replace("<" + ESCAPE, "<")) for part in parts]
    return [id_ for part in ids for id_ in part]


@pytest.mark.parametrize("generation_prompt", [False, True])
def test_ids_are_those_of_the_naive_twin_and_of_the_jinja_template(tokenizer, generation_prompt):
    template = ChatTemplate.of(tokenizer)
    chat = template.encode(CONVERSATION, generation_prompt)
    ids, predicted = naive(tokenizer, CONVERSATION, generation_prompt)
    assert chat.ids.tolist() == ids
    assert chat.predicted.tolist() == predicted
    assert (chat.ids.dtype, chat.predicted.dtype) == (np.int32, bool)
    assert ids_of_rendered(tokenizer, render(template.source, CONVERSATION, generation_prompt)) == ids
    assert list(template.stop_ids) == [tokenizer.token2id[turn_names(tokenizer)["end"]], tokenizer.eos_id]


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(CONTENTS, min_size=1, max_size=3))
def test_no_content_produces_a_turn_token_and_each_is_decoded_to_itself(tokenizer, contents):
    messages = [Message(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]
    template = ChatTemplate.of(tokenizer)
    ids = template.encode(messages).ids.tolist()
    special = [position for position, id_ in enumerate(ids) if id_ in tokenizer.vocabulary.special_ids]
    assert len(special) == 1 + 2 * len(messages)
    spans = zip(special[1::2], special[2::2], strict=True)
    assert [tokenizer.decode(ids[start + 1 : end]) for start, end in spans] == contents
    assert ids_of_rendered(tokenizer, render(template.source, messages)) == ids


def test_developer_is_read_as_system(tokenizer):
    template = ChatTemplate.of(tokenizer)
    messages = [Message("developer", "Be kind."), Message("user", "Hi")]
    expected = template.encode([Message("system", "Be kind."), Message("user", "Hi")])
    assert template.encode(messages).ids.tolist() == expected.ids.tolist()
    assert render(template.source, messages).count(turn_names(tokenizer)["system"]) == 1


@pytest.mark.parametrize(
    ("roles", "generation_prompt", "message"),
    [
        ("", False, "is empty"),
        ("tool", False, "message 1 has the role 'tool'"),
        ("assistant", False, "message 1 has the role 'assistant', expected 'user'"),
        ("user user", False, "message 2 has the role 'user', expected 'assistant'"),
        ("user system", False, "message 2 has the role 'system'"),
        ("system system", False, "message 2 has the role 'system', expected 'user'"),
        ("system", False, "a system message only"),
        ("user assistant", True, "the last message is the assistant's"),
    ],
)
def test_an_invalid_order_of_roles_is_refused(tokenizer, roles, generation_prompt, message):
    template = ChatTemplate.of(tokenizer)
    messages = [Message(role, "text") for role in roles.split()]
    with pytest.raises(UserError, match=message):
        template.encode(messages, generation_prompt)
    if len(messages) > 1 and not generation_prompt:
        with pytest.raises(jinja2.TemplateError):
            render(template.source, messages)
