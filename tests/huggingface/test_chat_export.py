"""Chat settings of an export: `apply_chat_template` of transformers gives the ids that the model was trained with."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers", reason="pip install -e '.[tokenizers]'")
pytest.importorskip("transformers", reason="pip install -e '.[bench]'")

import transformers

from slm_jax.chat.messages import Message
from slm_jax.chat.own_template import ESCAPE
from slm_jax.chat.template import ChatTemplate
from slm_jax.huggingface import chat_files, portable_tokenizer
from slm_jax.huggingface.export import export
from slm_jax.huggingface.gguf import modelfile
from slm_jax.utils.errors import UserError
from tests.huggingface.test_export import loaded_run
from tests.test_tokenizer.conftest import make
from tests.test_tokenizer.samples import LANGUAGES
from tokenizer import HybridTokenizer
from tokenizer.vocabulary import SPECIAL_TOKENS, TURN_TOKENS

KINDS = {
    "portable": {"portable": True},
    "portable, older": {"portable": True, "turn_tokens": False},
    "module": {},
    "module, older": {"turn_tokens": False},
}
MESSAGES = [
    Message("system", "Answer in one line."),
    Message("user", f"What is <|user|>?\n<EOS>{ESCAPE} <{ESCAPE}a <<|end|>"),
    Message("assistant", " A turn token: <RES> {{ 7 * 7 }} "),
    Message("user", LANGUAGES["english"][:80]),
]
PIECES = st.one_of(
    st.sampled_from(
        [*TURN_TOKENS, *SPECIAL_TOKENS, "<", "|>", ESCAPE, "<" + ESCAPE, "{{", "{% end %}", "\x00", "\r\n"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """The tokenizer, that of transformers, and the folder."""
    parent = tmp_path_factory.mktemp("chat")
    run = loaded_run(parent, make(vocab_size=500, **KINDS[request.param]))
    folder = export(run, parent / "out", chat=True)
    return run.tokenizer, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True), folder


def dicts(messages) -> list[dict[str, str]]:
    return [message._asdict() for message in messages]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_ids_in_transformers(exported, count):
    ours, theirs, _ = exported
    template = ChatTemplate.of(ours)
    messages = MESSAGES[:count]
    prompt = messages[-1].role == "user"
    ids = theirs.apply_chat_template(dicts(messages), add_generation_prompt=prompt, return_dict=False)
    assert list(ids) == template.encode(messages, prompt).ids.tolist()


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(st.lists(PIECES, max_size=6).map("".join), min_size=1, max_size=3))
def test_ids_of_any_contents_in_transformers(exported, contents):
    ours, theirs, _ = exported
    messages = [Message(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]
    ids = list(theirs.apply_chat_template(dicts(messages), return_dict=False))
    assert ids == ChatTemplate.of(ours).encode(messages).ids.tolist()
    special = [position for position, id_ in enumerate(ids) if id_ in ours.vocabulary.special_ids]
    spans = zip(special[1::2], special[2::2], strict=True)
    assert [ours.decode(ids[start + 1 : end]) for start, end in spans] == contents


def test_text_that_is_no_conversation(exported):
    """The module keeps names in a text as text; a stock tokenizer with a chat template does so on request."""
    ours, theirs, folder = exported
    text = f"a <|user|> <EOS> <{'x' if ours.portable else ESCAPE}"
    options = {"split_special_tokens": True} if ours.portable else {}
    assert theirs(text, add_special_tokens=False, **options).input_ids == ours.encode(text)
    for sample in LANGUAGES.values():
        assert theirs(sample, add_special_tokens=False).input_ids == ours.encode(sample)
    assert (folder / "chat_template.jinja").read_text() == ChatTemplate.of(ours).source == theirs.chat_template


def test_masks_of_the_assistant_in_transformers(exported):
    ours, theirs, _ = exported
    if not ours.portable:
        pytest.skip("transformers needs offsets, which tokenizers in Python do not have")
    messages = MESSAGES[:3]
    out = theirs.apply_chat_template(dicts(messages), return_dict=True, return_assistant_tokens_mask=True)
    assert [bool(each) for each in out["assistant_masks"]] == ChatTemplate.of(ours).encode(messages).predicted.tolist()


def test_generation_stops_at_the_end_of_a_turn(exported):
    ours, _, folder = exported
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == [ours.turn_ids.end, ours.eos_id]
    assert config["suppress_tokens"] == [id_ for id_ in ours.suppressed_ids if id_ != ours.turn_ids.end]
    assert "apply_chat_template" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == config["eos_token_id"]
    assert HybridTokenizer.load(folder / "tokenizer.hybtok").fingerprint == ours.fingerprint


def test_only_runs_trained_on_conversations_have_chat_settings(tmp_path):
    run = loaded_run(tmp_path, make(portable=True, vocab_size=500))
    folder = export(run, tmp_path / "base")
    assert not (folder / "chat_template.jinja").exists()
    settings_ = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings_["split_special_tokens"] is True
    assert "chat_template" not in settings_
    assert json.loads((folder / "tokenizer.json").read_text())["added_tokens"] == []
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == run.tokenizer.eos_id
    (run.run.corpus / "part").mkdir(parents=True)
    (run.run.corpus / "part" / "manifest.json").write_text(json.dumps({"chat_template": "0f"}))
    assert (export(run, tmp_path / "chat") / "chat_template.jinja").exists()
    assert not (export(run, tmp_path / "off", chat=False) / "chat_template.jinja").exists()


def test_a_difference_stops_the_export(tmp_path, monkeypatch):
    run = loaded_run(tmp_path, make(portable=True, vocab_size=500))
    keep = chat_files.add_chat
    monkeypatch.setattr(portable_tokenizer, "add_chat", lambda *args: keep(*args) | {"normalizer": None})
    with pytest.raises(UserError, match=r"the conversation .* has the ids"):
        export(run, tmp_path / "out", chat=True)


def test_the_modelfile_of_a_chat_model():
    text = modelfile("a.gguf", make(portable=True, vocab_size=500))
    assert 'PARAMETER stop "<|end|>"\nPARAMETER stop "<EOS>"\n' in text
    assert '{{- else if eq .Role "user" }}<|user|>\n' in text
    assert "@" not in text
    assert modelfile("a.gguf") == 'FROM ./a.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "<EOS>"\n'
