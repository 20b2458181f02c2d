"""Chat templates of published models: ids equal those of `apply_chat_template` of transformers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.chat.messages import Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.utils.errors import UserError
from tests.test_tokenizer.samples import LANGUAGES

tokenizers = pytest.importorskip("tokenizers", reason="pip install -e '.[tokenizers]'")

# Short forms of the templates of published models, with the features that matter for ids and spans.
CHATML = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim \
+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""
SMOLLM = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are SmolLM.<|im_end|>\\n' }}{% endif %}\
{% if message['role'] == 'assistant' %}{% generation %}\
{{ '<|im_start|>assistant\\n' + message['content'] + '<|im_end|>\\n' }}{% endgeneration %}\
{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
SPECIAL = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["<unk>", "<s>", "</s>"],
    "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "smollm": SMOLLM, "qwen3": QWEN3}
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "smollm": "<|im_end|>", "qwen3": "<|im_end|>"}
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CONVERSATION = [
    Message("user", "  What is a list?\n"),
    Message("assistant", "It is a *mutable* sequence. "),
    Message("user", "שלום 🙂"),
    Message("assistant", "Hello!"),
]


def make_files(folder: Path, name: str, template: str | list | None = None) -> Path:
    """A small tokenizer of the kind of a published model, in the layout of Hugging Face."""
    if name == "mistral":  # SentencePiece
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        parts = tokenizers.decoders
        tokenizer.decoder = parts.Sequence([parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse()])
        bytes_ = [f"<0x{value:02X}>" for value in range(256)]
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL[name], *bytes_])
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
        to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL[name], initial_alphabet=alphabet
        )
    tokenizer.train_from_iterator([LANGUAGES["english"] + " system user assistant\n\n"] * 20, trainer)
    if name == "qwen3":
        tokenizer.add_tokens([tokenizers.AddedToken(each, special=False) for each in ("<think>", "</think>")])
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [each for each in content["added_tokens"] if not each["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[name][1 if name == "mistral" else 0],
        "eos_token": SPECIAL[name][-1] if name == "mistral" else SPECIAL[name][1 if name == "llama3" else 0],
        "chat_template": template or TEMPLATES[name],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=TEMPLATES)
def model(request, tmp_path_factory):
    from slm_jax.utils.foreign_tokenizer import ForeignTokenizer

    folder = make_files(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, ForeignTokenizer.load(folder / "tokenizer.json"), folder


@pytest.fixture(scope="module")
def theirs(model):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[bench]'")
    return transformers.AutoTokenizer.from_pretrained(model[2])


def dicts(messages) -> list[dict[str, str]]:
    return [message._asdict() for message in messages]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_ids_are_those_of_transformers(model, theirs, count, generation_prompt):
    messages = CONVERSATION[:count]
    expected = theirs.apply_chat_template(dicts(messages), add_generation_prompt=generation_prompt, return_dict=False)
    chat = ChatTemplate.of(model[1]).encode(messages, generation_prompt)
    assert chat.ids.tolist() == list(expected)
    assert (chat.ids.dtype, chat.predicted.dtype, len(chat.predicted)) == (np.int32, bool, len(expected))


def test_assistant_turns_are_predicted_with_the_token_that_ends_them(model, theirs):
    name, tokenizer, _ = model
    template = ChatTemplate.of(tokenizer)
    assert template.stop_ids[0] == tokenizer.token2id[END[name]]
    assert set(tokenizer.stop_ids) <= set(template.stop_ids)
    chat = template.encode(CONVERSATION)
    runs = np.split(np.arange(len(chat.ids)), np.flatnonzero(np.diff(chat.predicted)) + 1)
    spans = [run for run in runs if chat.predicted[run[0]]]
    texts = [theirs.decode(chat.ids[span]) for span in spans]
    if name == "smollm":  # marked by the template itself
        marked = theirs.apply_chat_template(
            dicts(CONVERSATION), return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
        )
        assert chat.predicted.tolist() == [bool(each) for each in marked["assistant_masks"]]
        return
    assert len(spans) == 2
    assert [chat.ids[span[-1]] for span in spans] == [template.stop_ids[0]] * 2
    contents = ["It is a *mutable* sequence.", "Hello!"]
    assert [text.removesuffix(END[name]).strip().split("\n")[-1] for text in texts] == contents
    # A turn follows the prompt for it.
    for index, span in ((1, spans[0]), (3, spans[1])):
        prompt = template.encode(CONVERSATION[:index], generation_prompt=True).ids
        if name != "qwen3" or index == 3:  # the template shows thoughts of the last turn only
            assert chat.ids[: span[0]].tolist() == prompt.tolist()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_content_produces_a_special_token(model, data):
    name, tokenizer, _ = model
    pieces = st.sampled_from(
        [*SPECIAL[name], "<think>", "[INST]", "{{", "{% raw %}", "}}", "<|", "\ufdd0", "\x00", "\ud800", " ", "a\n"]
    )
    contents = data.draw(
        st.lists(st.lists(pieces, max_size=6).map(lambda parts: "x" + "".join(parts) + "y"), min_size=1, max_size=3)
    )
    roles = ["user", "assistant", "user"]
    messages = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
    plain = [Message(role, "xy") for role in roles[: len(messages)]]
    template = ChatTemplate.of(tokenizer)
    ids = template.encode(messages).ids
    special = [tokenizer.token2id[each] for each in SPECIAL[name]]
    assert ids[np.isin(ids, special)].tolist() == [id_ for id_ in template.encode(plain).ids.tolist() if id_ in special]
    text = "".join(tokenizer.decode([id_]) if id_ in special else "" for id_ in ids)
    assert text == ""
    if name != "mistral":  # byte-level: the ids of a content decode to it
        decoded = tokenizer._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        for content in contents:
            if name != "qwen3" or "</think>" not in content:
                assert content.replace("\ud800", "\ufffd") in decoded


def test_contents_with_names_have_the_ids_of_a_tokenizer_without_these_names(model):
    """The oracle: the same vocabulary in which no token is recognized by name, asked for the content alone."""
    name, tokenizer, _ = model
    if name == "mistral":
        pytest.skip("the first piece of SentencePiece depends on its place")
    plain = tokenizers.Tokenizer.from_str(
        json.dumps(json.loads(tokenizer.files["tokenizer.json"]) | {"added_tokens": []})
    )
    content = f"before{SPECIAL[name][-1]} after {SPECIAL[name][0]}{SPECIAL[name][0]}"
    ids = ChatTemplate.of(tokenizer).encode([Message("user", content)]).ids.tolist()
    expected = plain.encode("\n" * (2 if name == "llama3" else 1) + content, add_special_tokens=False).ids
    assert any(ids[start : start + len(expected)] == expected for start in range(len(ids)))


def test_a_template_in_its_own_file_and_one_of_a_list(tmp_path):
    from slm_jax.utils.foreign_tokenizer import ForeignTokenizer

    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": LLAMA3}]
    folder = make_files(tmp_path, "llama3", named)
    assert ChatTemplate.of(ForeignTokenizer.load(folder / "tokenizer.json")).source == LLAMA3
    (folder / "chat_template.jinja").write_text(CHATML)
    assert ChatTemplate.of(ForeignTokenizer.load(folder / "tokenizer.json")).source == CHATML


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for %}", "is not valid"),
        ("{{ bos_token }}", "leaves the response out"),
        ("{{ raise_exception('no') }}", "refuses the conversation: no"),
        ("{{ messages.__class__.__name__ }}", "refuses the conversation: .*unsafe"),
        ("{{ 'a' * 10**10 }}", "builds more than"),
    ],
)
def test_unusable_templates_are_refused(tmp_path, template, message):
    from slm_jax.utils.foreign_tokenizer import ForeignTokenizer

    folder = make_files(tmp_path, "llama3", template or "x")
    if template is None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        ChatTemplate.of(ForeignTokenizer.load(folder / "tokenizer.json"))


def test_a_template_that_hides_where_turns_start_is_refused_for_training_only(tmp_path):
    from slm_jax.utils.foreign_tokenizer import ForeignTokenizer

    template = "{{ messages | length }}" + LLAMA3  # the beginning depends on what follows
    folder = make_files(tmp_path, "llama3", template)
    chat = ChatTemplate.of(ForeignTokenizer.load(folder / "tokenizer.json"))
    assert len(chat.encode(CONVERSATION[:1]).ids)
    assert len(chat.encode(CONVERSATION[:3], generation_prompt=True).ids)
    with pytest.raises(UserError, match="before message 2 differently"):
        chat.encode(CONVERSATION)


def test_a_role_that_the_template_refuses(model):
    if model[0] == "mistral":
        with pytest.raises(UserError, match="roles must alternate"):
            ChatTemplate.of(model[1]).encode([Message("user", "a"), Message("user", "b")])
    with pytest.raises(UserError, match="message 1 has the role 'tool'"):
        ChatTemplate.of(model[1]).encode([Message("tool", "a")])


def changed(folder: Path, template: str | None = None, **changes):
    """The tokenizer of `make_files` with other fields of its tokenizer.json."""
    from slm_jax.utils.foreign_tokenizer import ForeignTokenizer

    make_files(folder, "chatml", template)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    tokens = changes.pop("added_tokens", {})
    content["added_tokens"] = [each | tokens for each in content["added_tokens"]]
    path.write_text(json.dumps(content | changes))
    return ForeignTokenizer.load(path)


def special_ids(tokenizer, content: str) -> list[int]:
    ids = ChatTemplate.of(tokenizer).encode([Message("user", content)]).ids.tolist()
    return [id_ for id_ in ids if id_ < len(SPECIAL["chatml"])]


def test_a_name_that_a_normalizer_makes_is_text(tmp_path):
    tokenizer = changed(tmp_path, normalizer={"type": "Lowercase"}, added_tokens={"normalized": True})
    assert special_ids(tokenizer, "a<|IM_END|>b") == special_ids(tokenizer, "ab") == [1, 2, 1, 2]
    assert tokenizer.token2id["<|im_end|>"] in tokenizer.encode("a<|IM_END|>b")  # the danger is there


@pytest.mark.parametrize(
    ("expression", "content"),
    [
        ("message.content + '>'", "a<|im_end|"),
        ("message.content | replace('<think>', '')", "a<|im_<think>end|>b"),
        ("message.content ~ message.content", "end|><|im_"),
    ],
)
def test_names_that_contents_and_template_form_together_are_refused(tmp_path, expression, content):
    tokenizer = changed(tmp_path, CHATML.replace("message.content", expression))
    with pytest.raises(UserError, match="together form the name of a special token"):
        special_ids(tokenizer, content)
    assert special_ids(tokenizer, "a < b | c >") == [1, 2, 1, 2]


def test_a_special_token_of_one_character(tmp_path):
    tokenizer = changed(tmp_path)
    content = json.loads(tokenizer.files["tokenizer.json"])
    id_ = tokenizer.vocab_size
    content["added_tokens"].append(content["added_tokens"][0] | {"id": id_, "content": "☯"})
    tokenizer = tokenizer.with_json(json.dumps(content).encode())
    assert id_ in tokenizer.encode("a☯☯b")
    ids = ChatTemplate.of(tokenizer).encode([Message("user", "a☯☯<|im_end|>b")]).ids
    assert id_ not in ids
    assert "a☯☯<|im_end|>b" in tokenizer._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("name", ["~", "the"])
def test_a_special_token_that_is_ordinary_text_is_refused_in_contents(tmp_path, name):
    """A letter of the byte alphabet, and a result of merges: without them, nothing encodes this text."""
    tokenizer = changed(tmp_path)
    content = json.loads(tokenizer.files["tokenizer.json"])
    vocab = content["model"]["vocab"]
    assert name in vocab
    content["added_tokens"].append(content["added_tokens"][0] | {"id": vocab[name], "content": name})
    content["added_tokens"].sort(key=lambda token: token["id"])
    template = ChatTemplate.of(tokenizer.with_json(json.dumps(content).encode()))
    with pytest.raises(UserError, match=f"special token '{name}' is ordinary text of this tokenizer as well"):
        template.encode([Message("user", f"a{name}b")])
    plain = template.encode([Message("user", "a, b")]).ids
    assert vocab[name] not in plain


def test_many_names_take_time_in_proportion(tmp_path):
    """Replaced one by one, each would copy the whole message: minutes for this one."""
    tokenizer = changed(tmp_path)
    assert special_ids(tokenizer, "<|im_end|>" * 60_000) == [1, 2, 1, 2]


def test_training_data_does_not_depend_on_the_day(tmp_path):
    tokenizer = changed(tmp_path, "{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    template = ChatTemplate.of(tokenizer)
    text = tokenizer.decode(template.encode(CONVERSATION[:2]).ids)
    assert text.startswith("2026-01-01")
    prompt = tokenizer.decode(template.encode(CONVERSATION[:1], generation_prompt=True).ids)
    assert re.match(r"20\d\d-\d\d-\d\d", prompt)
    assert not prompt.startswith("2026-01-01")
