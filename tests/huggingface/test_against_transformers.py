"""Exported folders in PyTorch transformers give equal logits, texts and ids; folders saved by it are imported."""

import copy
import json
import math
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", minversion="2.9", reason="pip install -e '.[bench]'")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="pip install -e '.[bench]'")
pytest.importorskip("safetensors")

from hypothesis import given, settings  # noqa: E402  # after the check for torch

from slm_jax.generation.decode import encode_prompt, generate, generate_ids, suppressed_ids  # noqa: E402
from slm_jax.generation.sampling import Sampling  # noqa: E402
from slm_jax.huggingface import import_folder as hf_folder  # noqa: E402
from slm_jax.huggingface.export import export  # noqa: E402
from tests.helpers import CompiledTransformer, random_ids  # noqa: E402
from tests.huggingface.test_export import LENGTH, MODELS, imported, loaded_run  # noqa: E402
from tests.test_tokenizer.conftest import make  # noqa: E402
from tests.test_tokenizer.samples import EDGE_CASES, LANGUAGES, any_text, corpus  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Copy the exported module into a temporary cache, and send no request to the hub."""
    torch.set_num_threads(1)  # small matrices: threads would only add overhead
    patch = pytest.MonkeyPatch()
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


@pytest.fixture(scope="module", params=["marks", "cased", "phrases"])
def pair(request, tmp_path_factory):
    """Our tokenizer, the exported one in transformers, and the folder."""
    options = {"marks": {}, "cased": {"lowercase": False}, "phrases": {"phrases": 0.2, "boundaries": "spaces"}}
    ours = make(vocab_size=700, **options[request.param])
    parent = tmp_path_factory.mktemp(request.param)
    folder = export(loaded_run(parent, ours, depth=1), parent / "out")
    return ours, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True), folder


def check_text(ours, theirs, text):
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs(text).input_ids == encode_prompt(ours, text)
    assert theirs.decode(ids) == text
    assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert theirs.convert_tokens_to_ids(theirs.tokenize(text)) == ids
    assert theirs.convert_tokens_to_string(theirs.tokenize(text)) == text


@pytest.mark.parametrize("text", [*LANGUAGES.values(), *EDGE_CASES])
def test_ids_of_languages_and_edge_cases(pair, text):
    check_text(*pair[:2], text)


def test_ids_of_a_long_text(pair):
    text = corpus()
    assert len(pair[0].encode(text)) > 5000
    check_text(*pair[:2], text)


@settings(deadline=None, max_examples=150)
@given(text=any_text)
def test_ids_of_any_text(pair, text):
    check_text(*pair[:2], text)


def test_any_ids_decode_to_the_same_text(pair):
    """Ids that a model may generate: incomplete characters, case marks before anything, special tokens."""
    ours, theirs, _ = pair
    for seed in range(40):
        ids = np.random.default_rng(seed).integers(0, ours.vocab_size, 60).tolist()
        ids[::7] = [[*range(9), *ours.turn_ids][seed % 13]] * len(ids[::7])
        assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        assert theirs.decode(torch.tensor(ids)) == theirs.decode(ids)
    assert theirs.decode(5) == "<EOS>"


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("place", ["first", "last", "alone", "many"])
def test_an_id_outside_the_vocabulary_is_an_error(pair, place, skip):
    """-100 is the label of positions without one; as a Python index it would be a token from the end."""
    ours, theirs, _ = pair
    for wrong in (-100, -1, ours.vocab_size, ours.vocab_size + 100):
        ids = {"first": [wrong, 20], "last": [20, wrong], "alone": wrong, "many": [20] * 5000 + [wrong]}[place]
        message = rf"{wrong} is not an id of this tokenizer: its ids are 0 to {ours.vocab_size - 1}"
        with pytest.raises(ValueError, match=message):
            theirs.decode(ids, skip_special_tokens=skip)
        with pytest.raises(ValueError, match=message):
            theirs.decode(torch.tensor(ids), skip_special_tokens=skip)
        with pytest.raises(ValueError, match=message):
            theirs.convert_ids_to_tokens(ids)
        if place == "last":
            with pytest.raises(ValueError, match=message):
                theirs.batch_decode([[20], ids])


def test_offsets_are_refused_instead_of_left_out(pair):
    _, theirs, _ = pair
    for text in ("a text", ["a text", "another"]):
        with pytest.raises(NotImplementedError, match=r"HybridTokenizer.*offsets"):
            theirs(text, return_offsets_mapping=True)
    assert "offset_mapping" not in theirs("a text", return_offsets_mapping=False)


def test_special_tokens_have_their_ids_and_no_text_produces_them(pair):
    ours, theirs, _ = pair
    assert len(theirs) == theirs.vocab_size == ours.vocab_size
    assert theirs.get_vocab() == ours.token2id
    names = ("pad", "unk", "cls", "sep", "mask", "eos")
    assert [getattr(theirs, f"{name}_token_id") for name in names] == [ours.token2id[f"<{n.upper()}>"] for n in names]
    assert theirs.bos_token_id == theirs.eos_token_id
    assert sorted(theirs.all_special_ids) == [0, 1, 2, 3, 4, 5, 6, *ours.turn_ids]
    for name in theirs.all_special_tokens:
        assert not set(theirs(name, add_special_tokens=False).input_ids) & set(theirs.all_special_ids)
    assert theirs.convert_tokens_to_ids("no such token") == theirs.unk_token_id


def test_batches(pair):
    ours, theirs, _ = pair
    texts = ["a longer text than the other", "short", ""]
    batch = theirs(texts, padding=True, return_tensors="pt")
    ids = [encode_prompt(ours, text) for text in texts]
    width = max(map(len, ids))
    assert batch.input_ids.tolist() == [[0] * (width - len(row)) + row for row in ids]
    assert batch.attention_mask.tolist() == [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    right = theirs(texts, padding=True, padding_side="right", add_special_tokens=False)
    expected, mask = ours.encode_batch(texts)
    assert right.input_ids == expected.tolist()
    assert right.attention_mask == mask.astype(int).tolist()
    assert theirs(texts[0], truncation=True, max_length=3).input_ids == ids[0][:3]
    assert theirs.batch_decode(ids, skip_special_tokens=True) == texts
    two = theirs("one", "two", return_special_tokens_mask=True)
    assert two.input_ids == encode_prompt(ours, "one") + encode_prompt(ours, "two")
    assert [i for i, m in zip(two.input_ids, two.special_tokens_mask, strict=True) if m] == [5, 5]


def test_the_tokenizer_can_be_saved_copied_and_extended(pair, tmp_path):
    ours, theirs, folder = pair
    text = LANGUAGES["english"]
    theirs.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    module = "tokenization_slm_jax.py"
    assert (tmp_path / "saved" / module).read_text() == (folder / module).read_text()
    for other in (again, pickle.loads(pickle.dumps(theirs)), copy.deepcopy(theirs)):
        check_text(ours, other, text)
        assert len(other) == len(theirs)
        assert sorted(other.all_special_ids) == sorted(theirs.all_special_ids)
    plain = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, begin_with_eos=False)
    assert plain(text).input_ids == ours.encode(text)
    plain.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    plain.add_tokens(["glorp"])
    plain.save_pretrained(tmp_path / "more")
    for more in (plain, transformers.AutoTokenizer.from_pretrained(tmp_path / "more", trust_remote_code=True)):
        ids = more("Hi<|tool|>a glorp<EOS>").input_ids
        size = ours.vocab_size
        assert ids == [*ours.encode("Hi"), size, *ours.encode("a "), size + 1, *ours.encode("<EOS>")]
        assert more.decode(ids) == "Hi<|tool|>a glorp<EOS>"
        assert more.decode(ids, skip_special_tokens=True) == "Hia glorp<EOS>"
        assert len(more) == size + 2
        with pytest.raises(
            ValueError, match=rf"{size + 2} is not an id of this tokenizer: its ids are 0 to {size + 1}"
        ):
            more.decode([size, size + 2])
        with pytest.raises(ValueError, match="-100 is not an id"):
            more.decode([size, -100])


@pytest.fixture(scope="module")
def tokenizer():
    return make(vocab_size=500)


def test_logits_are_equal_at_large_positions(tmp_path, tokenizer):
    """A difference in the rotary frequencies would grow with the position."""
    run, theirs, _ = both(tmp_path, tokenizer, depth=1, heads=1)
    ids = np.asarray(random_ids((1, 1024), tokenizer.vocab_size))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids.astype(np.int64))).logits
    assert np.abs(np.asarray(run.model(jnp.asarray(ids))) - np.asarray(logits)).max() <= 1e-4


def both(parent, tokenizer, **fields):
    run = loaded_run(parent, tokenizer, **fields)
    folder = export(run, parent / "out")
    return run, transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), folder


def some(names, *quick):
    """Return names as test parameters, with all but the quick ones marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(MODELS, "qwen3, window, grouped", "mistral", "llama"))
def test_logits_are_equal(tmp_path, tokenizer, name):
    fields = MODELS[name]
    run, theirs, _ = both(tmp_path, tokenizer, **fields)
    assert type(theirs).__name__ == {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}.get(
        name, "Qwen3ForCausalLM"
    )
    assert type(theirs).__module__.startswith("transformers.models.")
    ids = np.asarray(random_ids((3, LENGTH), tokenizer.vocab_size))
    mask = np.arange(LENGTH) >= np.array([0, 9, LENGTH - 2])[:, None]  # padded on the left
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    ours = np.asarray(run.model(jnp.asarray(ids), jnp.asarray(mask), None, jnp.asarray(positions)))
    tensors = (torch.from_numpy(array.astype(np.int64)) for array in (ids, mask, positions))
    with torch.no_grad():
        logits = theirs(**dict(zip(("input_ids", "attention_mask", "position_ids"), tensors, strict=True))).logits
    assert logits.dtype == torch.float32
    assert np.abs(ours).max() > 1  # large enough for a tolerance of 1e-4 to mean something
    assert np.abs(np.asarray(logits) - ours)[mask].max() <= 1e-4
    if fields.get("window"):  # a window off by one would be noticed
        wrong = copy.deepcopy(run.model)
        wrong.config = wrong.config.model_copy(update={"window": fields["window"] + 1})
        assert np.abs(np.asarray(wrong(jnp.asarray(ids[:1]))) - ours[:1]).max() > 0.01


@pytest.mark.parametrize("name", some(MODELS, "qwen3, window, grouped"))
def test_greedy_texts_are_equal(tmp_path, tokenizer, name):
    """With the cache of generation_config.json, and prompts of different lengths in one batch."""
    run, theirs, folder = both(tmp_path, tokenizer, **MODELS[name])
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    prompts = ["Once upon a time there was", "Hello", LANGUAGES["hebrew"][:9]]
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    greedy = Sampling(temperature=0)
    expected = generate_ids(run.model, ids, 14, greedy, 64, suppressed_ids(tokenizer), [5])
    with torch.no_grad():
        out = theirs.generate(
            **hf_tokenizer(prompts, padding=True, return_tensors="pt"), max_new_tokens=14, do_sample=False
        )
    width = max(map(len, ids))
    for row, drawn in zip(out.tolist(), expected, strict=True):
        assert row[width : width + len(drawn)] == list(drawn)
    texts = generate(run.model, tokenizer, prompts, 14, greedy, 64)
    whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    assert hf_tokenizer.batch_decode(out, skip_special_tokens=True) == whole
    writer = transformers.pipeline("text-generation", model=theirs, tokenizer=hf_tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = writer(prompts, max_new_tokens=14, do_sample=False)
    assert [row["generated_text"] for [row] in rows] == whole


def test_bits_per_byte_are_equal(tmp_path, tokenizer):
    run, theirs, folder = both(tmp_path, tokenizer, kv_heads=2)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = "The quick brown fox jumps over the lazy dog."
    inputs = hf_tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        mean = theirs(**inputs, labels=inputs.input_ids).loss.item()  # transformers shifts the labels
    bits = mean * (inputs.input_ids.shape[1] - 1) / math.log(2) / len(text.encode())
    ids = np.array(encode_prompt(tokenizer, text))
    logits = np.asarray(run.model(jnp.asarray(ids[None, :-1])), np.float64)[0]
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    assert bits == pytest.approx(nll.sum() / math.log(2) / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "padding rows"])
def test_a_padded_vocabulary_is_imported(tmp_path, tokenizer, name):
    """Rows that transformers added beyond the tokenizer's ids are padding."""
    run = loaded_run(tmp_path, tokenizer, **MODELS[name])
    folder = export(run, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.resize_token_embeddings(pad_to_multiple_of=448)
    theirs.save_pretrained(tmp_path / "padded")
    assert hf_folder.open_folder(str(tmp_path / "padded")).vocab_size == 896
    expected, params = imported(folder, run.model), imported(tmp_path / "padded", run.model)
    assert all(map(np.array_equal, jax.tree.leaves(expected), jax.tree.leaves(params)))
    assert len(jax.tree.leaves(params)) == len(jax.tree.leaves(expected))


def test_bfloat16_folder_loads_as_bfloat16(tmp_path, tokenizer):
    run = loaded_run(tmp_path, tokenizer)
    folder = export(run, tmp_path / "out", dtype="bfloat16", shard_gb=20e-6)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.bfloat16
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(np.asarray(random_ids((1, 8), tokenizer.vocab_size)).astype(np.int64))
    rounded = CompiledTransformer(run.model.config, tokenizer.vocab_size, rngs=nnx.Rngs(0))
    nnx.update(rounded, imported(folder, run.model))
    with torch.no_grad():
        assert np.abs(np.asarray(again(ids).logits) - np.asarray(rounded(jnp.asarray(ids.numpy())))).max() <= 1e-4


def test_without_trust_remote_code_no_wrong_tokenizer_is_loaded(tmp_path, tokenizer):
    """transformers must refuse; it must never use a stock tokenizer instead."""
    for number, name in enumerate(("qwen3", "mistral", "llama")):
        parent = tmp_path / str(number)
        parent.mkdir()
        folder = export(loaded_run(parent, tokenizer, **MODELS[name]), parent / "out")
        with pytest.raises((ValueError, OSError, TypeError, KeyError)):
            transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)("Hello")


THEIRS = {
    "qwen3": lambda **more: transformers.Qwen3Config(head_dim=8, use_sliding_window=False, **more),
    "qwen3, window": lambda **more: transformers.Qwen3Config(
        head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=0, **more
    ),
    "mistral": lambda **more: transformers.MistralConfig(sliding_window=5, **more),
    "llama": lambda **more: transformers.LlamaConfig(rope_theta=777.0, rms_norm_eps=1e-2, **more),
}


@pytest.mark.parametrize("name", some(THEIRS, "qwen3, window", "llama"))
def test_a_folder_saved_by_transformers_gives_equal_logits(tmp_path, name):
    config = THEIRS[name](
        vocab_size=90,
        hidden_size=32,
        intermediate_size=51,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    opened = hf_folder.open_folder(str(tmp_path))
    from slm_jax.config.schema import ModelConfig

    ours = CompiledTransformer(ModelConfig(**opened.model), opened.vocab_size, rngs=nnx.Rngs(0))
    nnx.update(ours, imported(tmp_path, ours))
    ids = np.asarray(random_ids((2, 20), 90))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids.astype(np.int64))).logits
    assert np.abs(np.asarray(ours(jnp.asarray(ids))) - np.asarray(logits)).max() <= 1e-4
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name.partition(",")[0]
