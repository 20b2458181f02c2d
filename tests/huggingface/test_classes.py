"""Random tiny models of every supported class of transformers: imported and exported, their logits stay equal."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", minversion="2.9", reason="pip install -e '.[bench]'")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="pip install -e '.[bench]'")
pytest.importorskip("safetensors")

from slm_jax.config.schema import Config, ModelConfig  # noqa: E402  # after the check for torch
from slm_jax.generation.decode import generate_ids  # noqa: E402
from slm_jax.generation.sampling import Sampling  # noqa: E402
from slm_jax.huggingface import import_folder as hf_folder  # noqa: E402
from slm_jax.huggingface.config_json import from_config_json, to_config_json  # noqa: E402
from slm_jax.huggingface.weights import to_tensors, write_tensors  # noqa: E402
from slm_jax.performance import flops  # noqa: E402
from slm_jax.utils.errors import UserError  # noqa: E402
from tests.helpers import CompiledTransformer, random_ids  # noqa: E402
from tests.huggingface.test_export import params_of  # noqa: E402

VOCAB = 90
LENGTH = 40
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 51,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
_MIXED = {"use_sliding_window": True, "sliding_window": 6, "num_hidden_layers": 3}

# Class and options of each case.
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {"rope_theta": 777.0, "rms_norm_eps": 1e-2}),
    "llama, llama3 scaling": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama, linear scaling": ("Llama", {"rope_parameters": _LINEAR}),
    "llama, yarn scaling": ("Llama", {"rope_parameters": _YARN}),
    "llama, yarn options": (
        "Llama",
        {"rope_parameters": _YARN | {"beta_fast": 16.0, "beta_slow": 0.5, "attention_factor": 1.3}},
    ),
    "llama, yarn mscale": ("Llama", {"rope_parameters": _YARN | {"mscale": 1.5, "mscale_all_dim": 0.7}}),
    "llama, wide heads": ("Llama", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral, wide heads": (
        "Mistral",
        {"sliding_window": None, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 12},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, mixed windows": ("Qwen2", _MIXED | {"max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, narrow heads": ("Qwen3", {"head_dim": 4, "tie_word_embeddings": True, "rope_parameters": _YARN}),
    "qwen3, mixed windows": (
        "Qwen3",
        _MIXED | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "arcee": ("Arcee", {"head_dim": 16, "rope_parameters": _LINEAR}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
    "smollm3, default layers": ("SmolLM3", {"num_hidden_layers": 4, "pad_token_id": 0}),
    "smollm3, mixed windows": ("SmolLM3", _MIXED | {"no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
}
_QUICK = ("llama, llama3 scaling", "qwen2, mixed windows", "qwen3, narrow heads", "smollm3, mixed windows")


def some(names, *quick):
    """Return names as test parameters, with all but the quick ones marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)  # small matrices: threads would only add overhead


def theirs_of(name):
    """Return a model of transformers whose random parameters, norms and biases included, all matter."""
    kind, options = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ours_of(folder, num_ids=0, **options):
    """Return the model that training would start from."""
    opened = hf_folder.open_folder(str(folder))
    hf_folder.check_size(opened)
    config = Config.from_tree({"model": opened.model | options}).model  # checked as in a run
    num_ids = num_ids or opened.vocab_size
    model = CompiledTransformer(config, num_ids, rngs=nnx.Rngs(0))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params_of(model))
    nnx.update(model, jax.tree.map(jnp.asarray, hf_folder.read_parameters(opened, shapes, num_ids)))
    return model


def export_to(folder, model, length=64):
    """Write weights and config.json as an export does, without a tokenizer."""
    folder.mkdir()
    write_tensors(to_tensors(params_of(model), model.vocab_size), folder, "float32", 10**9)
    content = to_config_json(model.config, model.vocab_size, length, "float32")
    (folder / "config.json").write_text(json.dumps(content))
    return content


def their_logits(model, ids):
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(np.asarray(ids).astype(np.int64))).logits)


@pytest.mark.parametrize("name", some(CASES, *_QUICK))
def test_logits_stay_equal(tmp_path, name):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ours_of(tmp_path / "theirs")
    ids = np.asarray(random_ids((2, LENGTH), VOCAB))
    expected = their_logits(theirs, ids)
    assert np.abs(expected).max() > 1  # large enough for a tolerance of 1e-4 to mean something
    logits = np.asarray(jax.jit(lambda ids: ours(ids))(jnp.asarray(ids)))
    assert np.abs(logits - expected).max() <= 1e-4
    count = sum(leaf.size for leaf in jax.tree.leaves(params_of(ours)))
    assert flops.parameters(ours.config, VOCAB) == count == sum(p.numel() for p in theirs.parameters())

    content = export_to(tmp_path / "ours", ours)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert content["model_type"] == theirs.config.model_type
    assert type(again) is type(theirs)
    assert np.array_equal(their_logits(again, ids), expected)
    assert ModelConfig(**from_config_json(content, "")[0]) == ours.config


@pytest.mark.parametrize("name", some(CASES, "qwen2, mixed windows"))
def test_gradients_are_equal(tmp_path, name):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    # Without id 0: it is the padding token of some cases, whose embedding gets no gradient in PyTorch.
    ids = 1 + np.asarray(random_ids((2, 16), VOCAB - 1))
    torch_ids = torch.from_numpy(ids.astype(np.int64))
    theirs(torch_ids, labels=torch_ids).loss.backward()  # transformers shifts the labels
    graph, params = nnx.split(ours_of(tmp_path), nnx.Param)

    def loss(params):
        logits = nnx.merge(graph, params)(jnp.asarray(ids))[:, :-1]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1))

    grads = dict(to_tensors(nnx.to_pure_dict(jax.jit(jax.grad(loss))(params)), VOCAB))
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert grads.keys() == expected.keys()
    for name, get in grads.items():
        np.testing.assert_allclose(get(), expected[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", some(CASES, "smollm3, mixed windows"))
def test_greedy_tokens_are_equal(tmp_path, name):
    """The cache and its masks know the options of every layer; also beyond the window."""
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tmp_path)
    prompt = np.asarray(random_ids((1, 9), VOCAB))
    with torch.no_grad():
        out = theirs.generate(
            torch.from_numpy(prompt.astype(np.int64)),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=False,
        )
    [drawn] = generate_ids(ours, prompt.tolist(), 20, Sampling(temperature=0), 64, [], [])
    assert out[0, 9:].tolist() == list(drawn)


@pytest.mark.parametrize(
    "options",
    [
        {"scan_layers": True},
        pytest.param({"scan_layers": True, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", some(CASES, "smollm3, mixed windows"))
def test_a_loop_over_layers_computes_the_same(tmp_path, name, options):
    """Layers that differ are branches of the compiled loop; gradients included."""
    theirs_of(name).save_pretrained(tmp_path)
    ids = random_ids((2, 16), VOCAB)

    def grads(**options):
        graph, params = nnx.split(ours_of(tmp_path, **options), nnx.Param)
        return jax.jit(jax.grad(lambda params: jnp.mean(nnx.merge(graph, params)(ids) ** 2)))(params)

    for leaf, expected in zip(jax.tree.leaves(grads(**options)), jax.tree.leaves(grads()), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-5)


def test_shards_half_precision_and_padding_rows(tmp_path):
    """A folder as on the hub: several bfloat16 files with an index, and rows beyond the tokenizer's ids."""
    theirs = theirs_of("qwen2").to(torch.bfloat16)
    theirs.resize_token_embeddings(pad_to_multiple_of=64)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = ours_of(tmp_path, num_ids=VOCAB)
    ids = np.asarray(random_ids((2, LENGTH), VOCAB))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = their_logits(theirs, ids)[..., :VOCAB]
    assert np.abs(np.asarray(ours(jnp.asarray(ids))) - expected).max() <= 1e-4
    theirs.half().save_pretrained(tmp_path / "half")
    half = ours_of(tmp_path / "half", num_ids=VOCAB)
    for leaf, rounded in zip(jax.tree.leaves(params_of(ours)), jax.tree.leaves(params_of(half)), strict=True):
        assert np.array_equal(np.asarray(leaf).astype(np.float16), rounded)


@pytest.mark.parametrize("fields", [{"window": 4, "full_layers": (1,)}, {"dim": 36, "head_dim": 8, "heads": 5}])
def test_options_of_this_project_find_a_class(tmp_path, fields):
    options = {"dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48, "qk_norm": False} | fields
    config = Config.from_tree({"model": options}).model
    ours = CompiledTransformer(config, VOCAB, rngs=nnx.Rngs(0))
    export_to(tmp_path / "out", ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = np.asarray(random_ids((2, LENGTH), VOCAB))
    assert np.abs(np.asarray(ours(jnp.asarray(ids))) - their_logits(theirs, ids)).max() <= 1e-4


def test_no_class_has_all_features():
    model = ModelConfig(qk_norm=True, qkv_bias=True)
    with pytest.raises(UserError, match=r"model\.qk_norm and model\.qkv_bias together: no exported architecture"):
        to_config_json(model, VOCAB, 64, "float32")
