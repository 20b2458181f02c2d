"""Published models by their config.json: they are read, and have as many parameters as their authors state."""

import pytest

from slm_jax.config.schema import Config
from slm_jax.huggingface.config_json import from_config_json
from slm_jax.performance import flops

_LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# The keys of the files on the hub that the model depends on, and the number of parameters of the safetensors there:
# model_type, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, vocab_size.
PUBLISHED = {
    "SmolLM2-135M": (
        ("llama", 576, 30, 9, 3, 1536, 49152),
        {"tie_word_embeddings": True, "rope_theta": 100000, "rope_scaling": None, "rope_interleaved": False},
        134_515_008,
    ),
    "Llama-3.2-1B": (
        ("llama", 2048, 16, 32, 8, 8192, 128256),
        {"tie_word_embeddings": True, "head_dim": 64, "rope_theta": 500000.0, "rope_scaling": _LLAMA3},
        1_235_814_400,
    ),
    "TinyLlama-1.1B": (
        ("llama", 2048, 22, 32, 4, 5632, 32000),
        {"tie_word_embeddings": False, "rope_scaling": None, "rms_norm_eps": 1e-05},
        1_100_048_384,
    ),
    "Mistral-7B-v0.1": (
        ("mistral", 4096, 32, 32, 8, 14336, 32000),
        {"tie_word_embeddings": False, "sliding_window": 4096, "rope_theta": 10000.0},
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        ("qwen2", 896, 24, 14, 2, 4864, 151936),
        {
            "tie_word_embeddings": True,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "max_window_layers": 24,
            "rope_theta": 1000000.0,
            "use_mrope": False,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        ("qwen3", 1024, 28, 16, 8, 3072, 151936),
        {
            "tie_word_embeddings": True,
            "head_dim": 128,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "rope_theta": 1000000,
        },
        596_049_920,
    ),
    "SmolLM3-3B": (
        ("smollm3", 2048, 36, 16, 4, 11008, 128256),
        {
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "no_rope_layer_interval": 4,
            "layer_types": ["full_attention"] * 36,
            "sliding_window": None,
            "use_sliding_window": False,
            "rope_theta": 5000000.0,
        },
        3_075_098_624,
    ),
}
KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_as_many_parameters_as_stated(name):
    sizes, more, count = PUBLISHED[name]
    content = dict(zip(KEYS, sizes, strict=True)) | {"hidden_act": "silu", "attention_bias": False} | more
    options, rows = from_config_json(content, name)
    model = Config.from_tree({"model": options}).model
    assert flops.parameters(model, rows) == count
    assert not any(model.layer_windows) or name.startswith("Mistral")
    assert model.nope_layers == (tuple(range(3, 36, 4)) if name == "SmolLM3-3B" else ())
    assert model.rope_scaling == ("llama3" if name == "Llama-3.2-1B" else "none")
