"""Export of a run and import of the folder, without transformers: files, errors, bits."""

import ast
import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("safetensors")

from slm_jax.config.option import TRAITS, traits_of
from slm_jax.config.schema import Config, ModelConfig  # after the check for safetensors
from slm_jax.huggingface import import_folder as hf_folder
from slm_jax.huggingface.bundle import bundle
from slm_jax.huggingface.config_json import NO_CLASS, from_config_json, to_config_json
from slm_jax.huggingface.export import TOKENIZER_MODULE, export, export_peft
from slm_jax.model.block import swiglu_width
from slm_jax.model.transformer import Transformer
from slm_jax.run.directory import Run
from slm_jax.run.load import LoadedRun
from slm_jax.utils.errors import UserError
from tests.helpers import tiny_model
from tests.test_tokenizer.conftest import make
from tokenizer import HybridTokenizer

MODELS = {
    "qwen3": {},
    "qwen3, window, grouped": {"window": 5, "kv_heads": 2, "rope_base": 500.0},
    "mistral": {"qk_norm": False, "window": 7, "kv_heads": 1, "tie_weights": False},
    "llama": {"qk_norm": False, "kv_heads": 2, "mlp_dim": 100, "mlp_multiple": 1, "norm_eps": 1e-2},
    "padding rows": {"vocab_multiple": 64, "tie_weights": False},
    "window of one": {"window": 1},
}
LENGTH = 32


@pytest.fixture(scope="session")
def small_tokenizer() -> HybridTokenizer:
    return make(vocab_size=500)


@functools.cache
def model_of(vocab_size: int, *fields: tuple[str, object]) -> Transformer:
    """Build a model once for all tests; they do not change it."""
    return tiny_model(vocab_size, **dict(fields))


def loaded_run(parent: Path, tokenizer: HybridTokenizer, metrics: str = "", **fields: object) -> LoadedRun:
    """Return a run of an untrained model whose random weights are large enough for every parameter to matter."""
    model = model_of(tokenizer.vocab_size, *fields.items())
    tree = {"model": dict(model.config), "train": {"sequence_length": LENGTH, "dtype": "float32"}}
    run = Run(parent / "run")
    run.path.mkdir(parents=True)
    run.metrics.write_text(metrics)
    return LoadedRun(run, Config.from_tree(tree), tokenizer, model, 7)


def params_of(model: Transformer) -> dict:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def imported(folder: Path, model: Transformer) -> dict:
    """Return the parameters that training would start from."""
    params = params_of(model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return hf_folder.read_parameters(hf_folder.open_folder(str(folder)), shapes, model.vocab_size)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_export_and_import_keep_every_bit(tmp_path, small_tokenizer, fields):
    run = loaded_run(tmp_path, small_tokenizer, **fields)
    folder = export(run, tmp_path / "out")
    opened = hf_folder.open_folder(str(folder))
    assert list(hf_folder.folder_misfits(opened, run.model.config)) == []
    assert opened.model["window"] == run.model.config.window
    assert opened.model["rope_base"] == run.model.config.rope_base
    back, rows = imported(folder, run.model), small_tokenizer.vocab_size
    for (path, imported_leaf), (_, leaf) in zip(
        jax.tree_util.tree_leaves_with_path(back),
        jax.tree_util.tree_leaves_with_path(params_of(run.model)),
        strict=True,
    ):
        assert imported_leaf.dtype == np.float32
        if path[0].key in ("embedding", "head"):
            assert np.array_equal(imported_leaf[:rows], leaf[:rows])
            assert not imported_leaf[rows:].any()  # padding
        else:
            assert np.array_equal(imported_leaf, leaf), path


def test_shards_hold_the_same_tensors_and_are_indexed(tmp_path, small_tokenizer):
    run = loaded_run(tmp_path, small_tokenizer)
    whole = export(run, tmp_path / "whole")
    split = export(run, tmp_path / "split", shard_gb=20e-6)
    files = sorted(path.name for path in split.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params_of(run.model))]
    assert index["metadata"]["total_size"] == sum(sizes)
    jax.tree.map(np.testing.assert_array_equal, imported(split, run.model), imported(whole, run.model))
    (split / files[1]).unlink()
    with pytest.raises(UserError, match=files[1]):
        imported(split, run.model)
    for text in ('{"weight_map": {"a": 3}}', '{"weight_map": []}', "[" * 100_000):
        (split / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index\.json is damaged"):
            imported(split, run.model)


def test_bfloat16_weights_are_rounded_once(tmp_path, small_tokenizer):
    run = loaded_run(tmp_path, small_tokenizer)
    folder = export(run, tmp_path / "out", dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params_of(run.model))
    jax.tree.map(np.testing.assert_array_equal, imported(folder, run.model), rounded)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("out", "single")[:1]]
    assert sizes[0] < 0.6 * 4 * sum(x.size for x in jax.tree.leaves(rounded))


MODEL_OPTIONS = {
    trait: {name for name, field in ModelConfig.model_fields.items() if trait in traits_of(field)} for trait in TRAITS
}


def test_every_model_option_is_exported_or_declared_unnecessary():
    not_exported = MODEL_OPTIONS["execution"] | MODEL_OPTIONS["training_only"]
    assert set(ModelConfig.model_fields) == MODEL_OPTIONS["exported"] | not_exported | NO_CLASS.keys()
    assert not NO_CLASS.keys() & (MODEL_OPTIONS["exported"] | not_exported)
    assert not MODEL_OPTIONS["exported"] & not_exported


def test_an_option_that_no_class_supports_is_refused():
    class Wider(ModelConfig):
        new_trick: int = 0

    # The subclass stands for a later version with one more option.
    with pytest.raises(UserError, match=r"model\.new_trick = 3"):
        to_config_json(Wider(new_trick=3), 100, 64, "float32")


UNSUPPORTED = [
    (
        {"logit_softcap": 15.0, "value_embeddings": (1, 3)},
        "model.logit_softcap = 15.0 (Gemma2ForCausalLM bounds logits",
    ),
    ({"value_embeddings": (1, 3)}, "model.value_embeddings = [1, 3] (none has value embeddings): no exported"),
    ({"mlp": "relu2"}, "model.mlp relu2 and model.qk_norm together"),
    ({"mlp": "relu2", "qk_norm": False, "window": 8}, "model.mlp relu2 and model.window together"),
]


@pytest.mark.parametrize(("fields", "message"), UNSUPPORTED, ids=str)
def test_parts_that_no_class_has_are_named_in_one_line(fields, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        to_config_json(ModelConfig(**fields), 100, 64, "float32")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_config_json_describes_the_same_model(fields):
    model = ModelConfig(**{"dim": 32, "depth": 2, "heads": 4, "mlp_dim": 96, **fields})
    written = json.loads(json.dumps(to_config_json(model, 321, LENGTH, "float32")))
    back, vocab_size = from_config_json(written, "config.json")
    assert vocab_size == 321
    again = ModelConfig(**back)
    assert swiglu_width(again) == swiglu_width(model)
    for name in MODEL_OPTIONS["exported"] - {"mlp_dim", "mlp_multiple", "kv_heads", "max_positions"}:
        assert getattr(again, name) == getattr(model, name), name
    assert again.max_positions == LENGTH
    assert again.kv_heads == (model.kv_heads or model.heads)


WRONG = {
    "model_type": ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    "head_dim": ({"head_dim": 9}, "head_dim 9: must be even"),
    "wide heads": ({"head_dim": 128}, None),
    "no head_dim": ({"head_dim": None}, None),
    "eps": ({"rms_norm_eps": 0}, "rms_norm_eps 0: must be a number above 0"),
    "no eps": ({"rms_norm_eps": None}, "rms_norm_eps None: must be a number above 0"),
    "eps of other Llamas": ({"rms_norm_eps": 1e-5}, None),
    "bias": ({"attention_bias": True}, "attention_bias True"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary positions of type 'dynamic'"),
    "no factor": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor is missing"),
    "no factor, old key": ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "factor is missing"),
    "shorter": ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor 0.5 must be at least 1"),
    "untruncated": ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate False"),
    "rope by layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
        "rope_parameters with 'full_attention'",
    ),
    "scaled twice": ({"rope_scaling": {"rope_type": "llama3"}}, "low_freq_factor is missing"),
    "no object": ({"rope_parameters": "x"}, "rope_parameters 'x': must be an object"),
    "no base": ({"rope_parameters": None, "rope_theta": "abc"}, "rope_theta 'abc': must be a number above 1"),
    "no list": ({"layer_types": 5}, "layer_types 5: must be a list"),
    "no count": ({"max_window_layers": None}, "max_window_layers None: must be an integer"),
    "no names": ({"layer_types": [{}]}, "layer_types with {}: full_attention and sliding_attention are supported"),
    "no name": ({"model_type": ["llama"]}, "model_type ['llama']"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "some windows": ({"layer_types": ["full_attention", "sliding_attention"]}, None),
    "too many layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000: at most 1,000 are supported"),
    "another kind of layer": ({"layer_types": ["full_attention", "chunked_attention"]}, "with 'chunked_attention'"),
    "too few layers": ({"layer_types": ["full_attention"]}, "layer_types of 1 layers: must have one for each of"),
    "layers of a class": (
        {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]},
        "layers that differ are supported for qwen3, qwen2, smollm3",
    ),
    "no such flags": ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "no_rope_layers [1, 2]: must have 0 or 1"),
    "missing": ({"hidden_size": None}, "hidden_size: must be a positive integer"),
    "kv heads": ({"num_key_value_heads": 3}, "num_key_value_heads 3: must divide"),
    "negative kv heads": ({"num_key_value_heads": -2}, "num_key_value_heads -2: must divide"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_unsupported_models_are_refused_with_the_reason(tmp_path, change, message):
    model = ModelConfig(dim=32, depth=2, heads=4)
    config = to_config_json(model, 321, LENGTH, "float32") | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    if message is None:
        hf_folder.open_folder(str(tmp_path))
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            hf_folder.open_folder(str(tmp_path))


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{", b"\xff", b"[]"])
def test_a_damaged_config_is_reported(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        hf_folder.open_folder(str(tmp_path))


def test_all_problems_of_a_config_are_reported_at_once(tmp_path):
    config = to_config_json(ModelConfig(dim=32, heads=4), 321, LENGTH, "float32")
    config |= {"rms_norm_eps": math.nan, "hidden_act": "relu"}
    with pytest.raises(UserError, match=r"(?s)hidden_act.*rms_norm_eps"):
        from_config_json(config, "config.json")


def test_sliding_windows_as_other_models_declare_them():
    """Qwen's window disabled, Mistral without one, windows from some layer on."""
    base = to_config_json(ModelConfig(dim=32, heads=4, depth=2), 9, LENGTH, "float32")
    del base["layer_types"]
    window = lambda **more: from_config_json(base | more, "x")[0]["window"]  # noqa: E731
    assert window(use_sliding_window=False, sliding_window=8) == 0
    assert window(use_sliding_window=True, sliding_window=8, max_window_layers=0) == 8
    assert window(use_sliding_window=True, sliding_window=8, max_window_layers=2) == 0
    assert window(model_type="mistral", sliding_window=None) == 0
    assert window(model_type="mistral", sliding_window=8) == 8
    assert window(model_type="llama", sliding_window=8) == 0
    mixed = base | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert ModelConfig(**from_config_json(mixed, "x")[0]).layer_windows == (0, 8)


@pytest.mark.parametrize(("kind", "missing", "null"), [("llama", 64, 64), ("mistral", 8, 64), ("qwen3", 32, 64)])
def test_key_value_heads_default_to_those_of_the_class(kind, missing, null):
    """transformers: a missing key has the default of the class, null means as many as heads."""
    base = to_config_json(ModelConfig(dim=512, heads=64), 9, LENGTH, "float32") | {"model_type": kind}
    heads = lambda config: from_config_json(config, "x")[0]["kv_heads"]  # noqa: E731
    assert heads(base | {"num_key_value_heads": None}) == null
    assert heads(base | {"num_key_value_heads": 16}) == 16
    del base["num_key_value_heads"]
    assert heads(base) == missing


def test_weights_that_do_not_fit_are_refused(tmp_path, small_tokenizer):
    run = loaded_run(tmp_path, small_tokenizer)
    folder = export(run, tmp_path / "out")
    depth = lambda n: jax.eval_shape(lambda: params_of(tiny_model(500, depth=n)))  # noqa: E731
    opened = hf_folder.open_folder(str(folder))
    with pytest.raises(UserError, match=r"tensor model\.layers\.2\S* is missing"):
        hf_folder.read_parameters(opened, depth(3), 500)
    with pytest.raises(UserError, match=r"no parameter for model\.layers\.1"):
        hf_folder.read_parameters(opened, depth(1), 500)
    with pytest.raises(UserError, match=r"k_proj.weight has shape \[32, 32\], expected \[64, 64\]"):
        hf_folder.read_parameters(opened, jax.eval_shape(lambda: params_of(tiny_model(500, dim=64))), 500)
    misfits = "; ".join(hf_folder.folder_misfits(opened, ModelConfig(dim=64, heads=2, tie_weights=False, mlp_dim=99)))
    for part in (
        "model.dim: 32 in the folder, 64 in this config",
        "model.heads: 4 in the folder",
        "model.tie_weights: True",
        "SwiGLU width: 64 in the folder",
    ):
        assert part in misfits
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="damaged"):
        imported(folder, run.model)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="safetensors only"):
        imported(folder, run.model)


def test_find_tokenizer(tmp_path, small_tokenizer):
    folder = export(loaded_run(tmp_path, small_tokenizer), tmp_path / "out")
    opened = hf_folder.open_folder(str(folder))
    own = hf_folder.find_tokenizer(opened, "")
    assert HybridTokenizer.load(own).fingerprint == small_tokenizer.fingerprint
    Path(own).rename(tmp_path / "elsewhere")
    (folder / "tokenizer.model").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.model is not read.*500 rows.*--tokenizer.path"):
        hf_folder.find_tokenizer(opened, "")
    assert hf_folder.find_tokenizer(opened, "english-8k") == "english-8k"
    with pytest.raises(UserError, match=r"no config\.json"):
        hf_folder.open_folder("Qwen/Qwen3-0.6B")


def test_the_folder_appears_complete_or_not_at_all(tmp_path, small_tokenizer, monkeypatch):
    run = loaded_run(tmp_path, small_tokenizer)
    monkeypatch.setattr("slm_jax.huggingface.model_card.write_card", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []
    monkeypatch.undo()
    folder = export(run, tmp_path / "deep" / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
        "tokenizer.hybtok",
        "tokenization_slm_jax.py",
        "README.md",
    }
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    with pytest.raises(UserError, match="not empty"):
        export(run, folder)
    monkeypatch.setattr("slm_jax.huggingface.model_card.write_card", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run, folder, overwrite=True)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export(run, folder, dtype="bfloat16", overwrite=True)
    assert (folder / "model.safetensors").stat().st_size < len(before["model.safetensors"])
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis.tex"):
        export(run, folder, overwrite=True)
    assert (folder / "thesis.tex").read_text() == "x"
    with pytest.raises(UserError, match="not a folder"):
        export(run, folder / "README.md")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    assert (export(run, tmp_path / "empty") / "config.json").is_file()
    for size in (0, -1, math.inf, math.nan):
        with pytest.raises(UserError, match=f"shard_gb {size}"):
            export(run, tmp_path / "other", shard_gb=size)


def test_the_card_states_what_the_run_recorded(tmp_path, small_tokenizer):
    rows = [{"step": n, "tokens": 100, "loss": 5.0, "seconds": 60.0 * n} for n in (1, 2, 3, 7, 8)]
    rows[2] |= {"val_loss": 3.25, "val_perplexity": 25.79, "val_accuracy": 0.3125, "val_bits_per_byte": 1.5}
    rows[4] |= {"val_loss": 1.0}
    run = loaded_run(tmp_path, small_tokenizer, "".join(json.dumps(row) + "\n" for row in rows), window=9)
    results = [{"task": "blimp", "group": "agreement", "metric": "accuracy", "value": 0.61234, "low": 0.6, "high": 0.7}]
    results += [{**results[0], "group": f"syntax / agreement / paradigm_{number}"} for number in range(67)]
    (run.run.path / "evaluation.json").write_text(json.dumps({"results": results}))
    run.run.samples.write_bytes(b"\n## Step 3\n\n    Once upon\n    a time\xff\n\n## Step 8\n\n    later\n")
    folder = export(run, tmp_path / "out", name="Tiny", license="mit")
    card = (folder / "README.md").read_text()
    header = card.split("---\n")[1]
    assert 'license: "mit"\n' in header
    assert "# Tiny\n" in card
    assert "sliding-window attention over 9 tokens" in card
    assert "7 steps of 16 x 32 tokens (packed), 400 predicted tokens, 7.0 minutes" in card
    assert "step 3: loss 3.2500, perplexity 25.79, bits per byte 1.5000, next-token accuracy 31.2%" in card
    assert "| blimp | agreement | accuracy | 0.6123 | 0.6000 to 0.7000 |" in card
    table, _, details = card.partition("<details>\n<summary>All 67 paradigms</summary>\n\n| task")
    assert "paradigm_" not in table
    assert details.partition("</details>")[0].count("paradigm_") == 67
    assert "Once upon\na time\ufffd\n" in card
    assert "later" not in card  # generated after the exported step
    assert str(tmp_path) not in card
    plain = (export(run, tmp_path / "plain") / "README.md").read_text()
    assert "license" not in plain.split("---\n")[1]
    assert "# run\n" in plain


@pytest.mark.parametrize("heading", ["\n## Step ", "\n## Step 6", "\n## Step \n\n    later\n", "\n## St"])
def test_a_torn_heading_in_samples_does_not_break_the_export(tmp_path, small_tokenizer, heading):
    run = loaded_run(tmp_path, small_tokenizer)
    run.run.samples.write_text(f"\n## Step 3\n\n    Once upon\n{heading}")
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "Once upon\n" in card
    assert "later" not in card


def test_the_card_names_datasets_but_no_files(tmp_path, small_tokenizer):
    """Manifests as the sources write them: built-in text, a user's files, a dataset of the hub."""
    size = {"documents": 3, "tokens": 1000, "bytes": 2_500_000, "prompts": 0}
    base = {"format": 2, "train": size, "validation": size}
    hub = ["hub", "yahma/alpaca-cleaned", "", "train", "", "text", "alpaca", "output", False]
    docs = base | {"name": "python-docs", "version": "3.11.7", "source": "3.11.7"}
    files = base | {"name": "secret", "version": "", "source": [["/home/me/secret.txt", 5, 6]]}
    alpaca = base | {"name": "alpaca", "version": "abc", "source": hub, "train": size | {"prompts": 400}}
    cards = []
    for number, manifest in enumerate((docs, files, alpaca)):
        run = loaded_run(tmp_path / str(number), small_tokenizer)
        run.run.corpus.mkdir()
        (run.run.corpus / "manifest.json").write_text(json.dumps(manifest))
        cards.append((export(run, tmp_path / f"out{number}") / "README.md").read_text())
    assert "Text: the documentation of Python 3.11.7, 3 documents, 1,000 tokens, 2.50 MB; 2.50 MB held" in cards[0]
    assert "Text: text files, 3 documents" in cards[1]
    assert "secret" not in cards[1]
    assert 'datasets:\n- "yahma/alpaca-cleaned"\n' in cards[2].split("---\n")[1]
    assert "Prompts with the template 'alpaca'." in cards[2]
    assert "template" not in cards[0].partition("## Training")[2]


def test_the_exported_module_is_self_contained():
    source = bundle(TOKENIZER_MODULE)
    tree = ast.parse(source)
    roots = {"transformers", "numpy"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add((node.module or "").partition(".")[0])
    assert not roots & {"tokenizer", "slm_jax", "pickle", "jax"}
    assert not re.search(r"\b(pickle|eval|exec|subprocess|socket|urllib)\b\s*[.(]", source)
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) == len(set(names))
    assert "SlmJaxTokenizer" in names
    assert (tree.body[1].module, tree.body[1].names[0].name) == ("__future__", "annotations")


def test_imports_that_cannot_be_bundled_are_refused(tmp_path):
    for source, message in (
        ("from tokenizer.storage import read as r\n", "as"),
        ("from tokenizer import HybridTokenizer\n", "not a single-file module"),
        ("from tokenizer.storage import read\ndef read(): ...\n", "read is defined"),
    ):
        (tmp_path / "module.py").write_text(source)
        with pytest.raises(ValueError, match=message):
            bundle(tmp_path / "module.py")


def test_adapters_of_a_model_without_a_class_are_refused(tmp_path):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.save_config(Config.load("quickstart", **{"lora.rank": 2, "init.from_run": "runs/a", "model.logit_softcap": 15}))
    with pytest.raises(UserError, match=r"model.logit_softcap = 15.* no exported architecture supports this"):
        export_peft(run, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
