"""GGUF export: what the file contains, and equal logits, ids and texts in llama.cpp where that is installed."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")

from slm_jax.chat.messages import Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.cli import export as export_command
from slm_jax.generation.decode import encode_prompt, generate, generate_ids, suppressed_ids
from slm_jax.generation.sampling import Sampling
from slm_jax.huggingface import gguf as gguf_export
from slm_jax.huggingface.export import export_gguf
from slm_jax.utils.errors import UserError
from tests.huggingface.test_export import loaded_run
from tests.test_tokenizer.conftest import make
from tests.test_tokenizer.samples import EDGE_CASES, LANGUAGES

CASES = {
    "qwen3": {"kv_heads": 2},
    "qwen2": {"qk_norm": False, "qkv_bias": True, "tie_weights": False},
    "llama": {"qk_norm": False, "kv_heads": 2, "rope_base": 500.0},
}
PROMPTS = ["Once upon a time there was", "Hello", " The  king\n\nof", "x", *list(LANGUAGES.values())[:6]]


@pytest.fixture(scope="module")
def portable():
    return make(portable=True, vocab_size=500)


def test_other_tokenizers_and_models_are_refused(tmp_path, portable):
    pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")
    with pytest.raises(UserError, match="portable tokenizer"):
        export_gguf(loaded_run(tmp_path / "a", make(vocab_size=500)), tmp_path / "out")
    with pytest.raises(UserError, match=r"of a published model: .*convert_hf_to_gguf\.py"):
        gguf_export.check_gguf({}, object(), "float32")
    with pytest.raises(UserError, match="full attention"):
        export_gguf(loaded_run(tmp_path / "b", portable, window=5), tmp_path / "out")
    odd = {"dim": 32, "heads": 3, "kv_heads": 3, "head_dim": 8, "qk_norm": False}
    with pytest.raises(UserError, match="width of 32 that is not a multiple of 3 heads"):
        export_gguf(loaded_run(tmp_path / "d", portable, **odd), tmp_path / "out")
    with pytest.raises(UserError, match="multiples of 32"):
        export_gguf(loaded_run(tmp_path / "c", portable, mlp_dim=100, mlp_multiple=1), tmp_path / "out", "q8_0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--license", "mit"], ["--shard_gb", "5"]])
def test_options_without_effect_are_refused(tmp_path, option):
    with pytest.raises(UserError, match=f"{option[0]} is for --format transformers only"):
        export_command.main(["--run", str(tmp_path), "--to", str(tmp_path / "out"), "--format", "gguf", *option])


def test_the_missing_package_is_named(tmp_path, portable, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install -e .\.\[gguf\]"):
        export_gguf(loaded_run(tmp_path, portable), tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_content_of_the_file(tmp_path, portable, dtype):
    gguf = pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")
    run = loaded_run(tmp_path, portable, dim=64, mlp_dim=96, mlp_multiple=1)
    folder = export_gguf(run, tmp_path / "out", dtype, name="small")
    assert {path.name for path in folder.iterdir()} == {f"small-{dtype}.gguf", "Modelfile"}
    assert f"FROM ./small-{dtype}.gguf\n" in (folder / "Modelfile").read_text()
    reader = gguf.GGUFReader(folder / f"small-{dtype}.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == gguf_export.PRE_TOKENIZER
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == portable.vocab_size
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    embedding = np.asarray(run.model.embedding)[: portable.vocab_size]
    stored = tensors["token_embd.weight"]
    values = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(embedding.shape)
    tolerance = {"float32": 0, "float16": 1e-3, "bfloat16": 8e-3, "q8_0": 1e-2}[dtype]
    assert np.abs(values - embedding).max() <= tolerance * np.abs(embedding).max()
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    export_gguf(run, folder, overwrite=True)  # replaces its own files
    assert len(list(folder.glob("*.gguf"))) == 1


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(tmp_path, portable, name):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")
    run = loaded_run(tmp_path, portable, **CASES[name])
    (file,) = export_gguf(run, tmp_path / "out").glob("*.gguf")
    theirs = llama_cpp.Llama(str(file), n_ctx=128, logits_all=True, n_threads=1, verbose=False)
    for text in [*LANGUAGES.values(), *EDGE_CASES]:
        text = text.encode("utf-8", "replace").decode()
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == portable.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == encode_prompt(portable, text)
        assert theirs.detokenize(portable.encode(text)) == text.encode()
    ids = encode_prompt(portable, PROMPTS[0])
    theirs.eval(ids)
    own = np.asarray(run.model(jnp.array([ids])))[0]
    assert np.abs(own).max() > 1
    assert np.abs(np.array(theirs.scores[: len(ids)]) - own).max() < 5e-3  # llama.cpp rounds the cache to float16
    greedy = Sampling(temperature=0)
    prompts = [encode_prompt(portable, prompt) for prompt in PROMPTS]
    expected = generate_ids(run.model, prompts, 8, greedy, 128, suppressed_ids(portable), [5])
    texts = generate(run.model, portable, PROMPTS, 8, greedy, 128)
    for prompt, row, text in zip(prompts, expected, texts, strict=True):
        drawn: list[int] = []
        theirs.reset()
        theirs.eval(prompt)
        while len(drawn) < 8:
            logits = np.array(theirs.scores[theirs.n_tokens - 1])
            logits[suppressed_ids(portable)] = -np.inf
            token = int(logits.argmax())
            if token == 5:
                break
            drawn.append(token)
            theirs.eval([token])
        assert drawn == [token for token in row if token != 5]
        assert theirs.detokenize(drawn).decode("utf-8", "replace") == text


@pytest.mark.parametrize("turn_tokens", [True, False])
def test_conversations_in_llama_cpp(tmp_path, turn_tokens):
    """The template in the file, rendered as llama.cpp does, gives the ids of the run; no message has a turn token."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")
    tokenizer = make(portable=True, vocab_size=500, turn_tokens=turn_tokens)
    (file,) = export_gguf(loaded_run(tmp_path, tokenizer), tmp_path / "out", chat=True).glob("*.gguf")
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    end = tokenizer.turn_ids.end
    assert int(theirs.metadata["tokenizer.ggml.eot_token_id"]) == end
    assert theirs._model.token_eot() == end
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        theirs.metadata["tokenizer.chat_template"], eos_token="<EOS>", bos_token="<EOS>"
    )
    template = ChatTemplate.of(tokenizer)
    for text in [*LANGUAGES.values(), "def f(x):\n    return x < 3 and x <= 4  # <a>"]:
        messages = [Message("system", "Hi"), Message("user", text), Message("assistant", text), Message("user", text)]
        prompt = formatter(messages=[message._asdict() for message in messages]).prompt
        ids = theirs.tokenize(prompt.encode(), add_bos=False, special=True)
        assert ids == template.encode(messages, generation_prompt=True).ids.tolist()
    names = "".join(tokenizer.id2token[id_] for id_ in tokenizer.vocabulary.special_ids)
    prompt = formatter(messages=[{"role": "user", "content": names}]).prompt
    ids = theirs.tokenize(prompt.encode(), add_bos=False, special=True)
    special = [id_ for id_ in ids if id_ in tokenizer.vocabulary.special_ids]
    assert special == [5, tokenizer.turn_ids.user, end, tokenizer.turn_ids.assistant]
