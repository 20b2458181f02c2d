"""`config.json` of the stock transformers classes to and from the `model.*` options.

Six classes compute what `slm_jax.model.transformer` computes; the options decide which:

    qk_norm                        Qwen3     RMSNorm on queries and keys per head; a window in all, some or no layers
    qkv_bias                       Qwen2     biases on queries, keys and values; windows as in Qwen3
    nope_layers, or a window in
    some of the layers only        SmolLM3   layers without rotary positions; windows as in Qwen3
    a window in all layers         Mistral
    mlp relu2                      Arcee     full attention in all layers
    none of these                  Llama     also SmolLM2, Llama 3.2 and others

All rotate the channel pairs (i, i + K/2) of a head, assign query heads to key/value heads in order, have no other
biases if so configured, and define a window as this project does: `sliding_window` tokens, the querying one included.
"""

from collections.abc import Iterator
from typing import Any

from slm_jax.config.option import traits_of
from slm_jax.config.schema import ModelConfig
from slm_jax.huggingface.rope_json import rope_options, rope_problems, to_rope_json
from slm_jax.model.block import mlp_width
from slm_jax.utils.errors import UserError
from tokenizer.vocabulary import SPECIAL_TOKENS

CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "arcee": "ArceeForCausalLM",
    "llama": "LlamaForCausalLM",
}
_MAX_LAYERS = 1000
_PATTERNED = ("qwen3", "qwen2", "smollm3")  # classes whose layers may differ in their window

PAD_ID = SPECIAL_TOKENS.index("<PAD>")
EOS_ID = SPECIAL_TOKENS.index("<EOS>")

# What each class assumes if a config.json does not say; the keys that all share are below.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2_000_000.0},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "arcee": {"hidden_act": "relu2", "rms_norm_eps": 1e-5},
    "llama": {},
}
_ACTIVATIONS = {"arcee": ("relu2",)}  # of the MLP; the other classes have a SwiGLU

# Options that no class computes together with the rest of this model, each with the class that comes closest.
NO_CLASS = {
    "logit_softcap": "Gemma2ForCausalLM bounds logits, but also normalizes the output of each sub-layer",
    "attention_gate": "Qwen3NextForCausalLM gates attention, but by all channels of a layer",
    "value_embeddings": "none has value embeddings",
    "residual_scales": "none has scales of the residual stream",
}
_SHARED_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "no_rope_layer_interval": 4}


def to_config_json(model: ModelConfig, vocab_size: int, length: int, dtype: str) -> dict[str, Any]:
    """Convert model options to a config.json.

    Args:
        model: The model's options.
        vocab_size: Number of ids; padding rows of the embedding (`vocab_multiple`) are not exported.
        length: The sequence length that the model was trained at.
        dtype: Data type of the exported weights.

    Returns:
        The content of config.json.

    Raises:
        UserError: An option has a value that no supported class can express.
    """
    check_options(model)
    kind = _architecture(model)
    config: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.head_width,
        "intermediate_size": mlp_width(model),
        "hidden_act": "silu" if model.mlp == "swiglu" else model.mlp,
        "max_position_embeddings": max(length, model.max_positions),
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        **to_rope_json(model),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_weights,
        # The cache of transformers keeps window - 1 tokens; for a window of 1 it would keep all instead of none.
        "use_cache": model.window != 1,
        "torch_dtype": dtype,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    if kind == "mistral":
        config["sliding_window"] = model.window or None
    elif kind in _PATTERNED:
        windows = model.layer_windows
        config["use_sliding_window"] = any(windows)
        config["sliding_window"] = max(windows) or None
        config["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    if kind in ("qwen3", "qwen2"):
        # Earlier versions of transformers read this instead of layer_types: the first layer with the window.
        config["max_window_layers"] = next((n for n, window in enumerate(windows) if window), model.depth)
    if kind == "smollm3":
        config["no_rope_layers"] = [int(layer not in model.nope_layers) for layer in range(model.depth)]
    if kind in ("mistral", "qwen2"):  # not an option of these
        del config["attention_bias"]
    if kind in ("llama", "smollm3", "arcee"):
        config["mlp_bias"] = False
    return config


def check_options(model: ModelConfig) -> None:
    """Raise UserError if an option has a value that no class can express; names all of them."""
    problems = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if not traits_of(field) & {"exported", "execution", "training_only"} and value != field.default:
            shown = list(value) if isinstance(value, tuple) else value
            problems.append(f"model.{name} = {shown}" + (f" ({NO_CLASS[name]})" if name in NO_CLASS else ""))
    if problems:
        raise UserError(
            f"{', '.join(problems)}: no exported architecture supports {'this' if len(problems) == 1 else 'these'}; "
            "generate, chat, serve and evaluate read the run itself, and a model trained with the defaults of these "
            "options can be exported"
        )


def _architecture(model: ModelConfig) -> str:
    """Return the key in `CLASSES` of the class that computes a model.

    Raises:
        UserError: No class has all of its features.
    """
    features = [name for name in ("qk_norm", "qkv_bias", "nope_layers") if getattr(model, name)]
    if len(features) > 1:
        raise UserError(f"model.{features[0]} and model.{features[1]} together: no exported architecture supports both")
    if features and model.mlp != "swiglu":
        raise UserError(
            f"model.mlp {model.mlp} and model.{features[0]} together: no exported architecture supports both "
            "(ArceeForCausalLM has the MLP, but plain attention)"
        )
    if features:
        return {"qk_norm": "qwen3", "qkv_bias": "qwen2", "nope_layers": "smollm3"}[features[0]]
    windows = set(model.layer_windows)
    if model.mlp == "relu2":
        if any(windows):
            raise UserError("model.mlp relu2 and model.window together: no exported architecture supports both")
        if model.dim % model.heads:  # as the class of Llama
            sizes = f"model.dim {model.dim}, which is no multiple of {model.heads} heads"
            raise UserError(f"model.mlp relu2 with {sizes}: no exported architecture supports both")
        return "arcee"
    if len(windows) > 1:
        return "smollm3"
    # The class of Llama refuses a width that is no multiple of the heads, also where the head width is given.
    return "mistral" if any(windows) or model.dim % model.heads else "llama"


def from_config_json(config: dict[str, Any], name: str) -> tuple[dict[str, Any], int]:
    """Convert a config.json to model options.

    Args:
        config: The content of config.json.
        name: Its name in error messages.

    Returns:
        The `model.*` options by name, and the number of rows of the embedding.

    Raises:
        UserError: The model has features that are not supported here; the message names all of them.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CLASSES:
        config = {**_SHARED_DEFAULTS, **_DEFAULTS[kind], **config}
    problems = list(_unsupported(config))
    if problems:
        raise UserError(f"{name}: this model is not supported:" + "".join(f"\n  - {problem}" for problem in problems))
    dim, heads, depth = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    windows = _windows(config)
    width = _head_width(config)
    options = {
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "kv_heads": _kv_heads(config),
        "head_dim": 0 if width * heads == dim else width,
        # The inner width of a SwiGLU is 2/3 of mlp_dim, rounded up: this mlp_dim gives the same width again.
        "mlp_dim": config["intermediate_size"] if kind == "arcee" else 3 * config["intermediate_size"] // 2,
        "mlp_multiple": 1,
        "window": max(windows),
        "full_layers": tuple(layer for layer in range(depth) if any(windows) and not windows[layer]),
        "mlp": "relu2" if kind == "arcee" else "swiglu",
        "tie_weights": config.get("tie_word_embeddings", False),
        "qk_norm": kind == "qwen3",
        "qkv_bias": kind == "qwen2",
        "norm_eps": config["rms_norm_eps"],
        "nope_layers": _nope_layers(config),
        "max_positions": config.get("max_position_embeddings") or 0,
        **rope_options(config),
    }
    return options, config["vocab_size"]


_POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
# Types of optional keys.
_TYPES: dict[str, tuple[str, Any]] = {
    "num_key_value_heads": ("an integer", int | None),
    "head_dim": ("an integer", int | None),
    "sliding_window": ("an integer", int | None),
    "use_sliding_window": ("true or false", bool | None),
    "max_window_layers": ("an integer", int),
    "max_position_embeddings": ("an integer", int | None),
    "tie_word_embeddings": ("true or false", bool),
    "layer_types": ("a list", list | None),
    "no_rope_layers": ("a list", list | None),
    "no_rope_layer_interval": ("an integer", int),
    "rope_parameters": ("an object", dict | None),
    "rope_scaling": ("an object", dict | None),
}


def _unsupported(config: dict[str, Any]) -> Iterator[str]:
    """Yield everything in a config.json that is invalid or not supported."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        yield f"model_type {kind!r}: must be one of {', '.join(CLASSES)}"
        return
    missing = [key for key in _POSITIVE_INTEGERS if not isinstance(config.get(key), int) or not 0 < config[key] < 2**31]
    if missing:
        yield f"{', '.join(missing)}: must be a positive integer"
        return
    if config["num_hidden_layers"] > _MAX_LAYERS:  # of which lists are made
        yield f"num_hidden_layers {config['num_hidden_layers']}: at most {_MAX_LAYERS:,} are supported"
        return
    if wrong := [key for key in config.keys() & _TYPES if not isinstance(config[key], _TYPES[key][1])]:
        yield from (f"{key} {config[key]!r}: must be {_TYPES[key][0]}" for key in sorted(wrong))
        return
    yield from _unsupported_heads(config)
    activations = _ACTIVATIONS.get(config["model_type"], ("silu", "swish"))
    if config["hidden_act"] not in activations:
        yield f"hidden_act {config['hidden_act']!r}: only {activations[0]} is supported"
    if not isinstance(config["rms_norm_eps"], int | float) or not 0 < config["rms_norm_eps"] < 1e30:
        yield f"rms_norm_eps {config['rms_norm_eps']!r}: must be a number above 0"
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            yield f"{key} {config[key]}: no biases are supported but those of qwen2 on queries, keys and values"
    yield from rope_problems(config)
    if method := config.get("quantization_config"):
        yield f"quantization_config {method!r}: quantized weights are not supported, float32, float16 and bfloat16 are"
    yield from _unsupported_layers(config)


def _unsupported_heads(config: dict[str, Any]) -> Iterator[str]:
    heads, kv_heads, width = config["num_attention_heads"], _kv_heads(config), _head_width(config)
    if width < 2 or width % 2:
        yield f"head_dim {width}: must be even, as rotary positions pair the channels of a head"
    if kv_heads < 1 or heads % kv_heads:
        yield f"num_key_value_heads {kv_heads}: must divide num_attention_heads {heads}"


def _kv_heads(config: dict[str, Any]) -> int:
    """Return the number of key/value heads; a class has a default for a missing key, not for null."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _head_width(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _unsupported_layers(config: dict[str, Any]) -> Iterator[str]:
    """Yield problems of the options that differ between layers."""
    depth = config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is not None:
        kinds = ("full_attention", "sliding_attention")
        if unknown := [kind for kind in types if kind not in kinds]:
            yield f"layer_types with {unknown[0]!r}: {' and '.join(kinds)} are supported"
        elif len(types) != depth:
            yield f"layer_types of {len(types)} layers: must have one for each of num_hidden_layers {depth}"
        elif config["model_type"] not in _PATTERNED and len(set(types)) > 1:
            yield f"layer_types {types!r}: layers that differ are supported for {', '.join(_PATTERNED)}"
        elif config["model_type"] == "smollm3" and "sliding_attention" in types and not _enables_window(config):
            yield "layer_types with 'sliding_attention': needs use_sliding_window true and a sliding_window"
    window = config.get("sliding_window")
    if window is not None and window < 0:
        yield f"sliding_window {window}: must be at least 1, or null"
    if config["model_type"] != "smollm3":
        return
    flags = config.get("no_rope_layers")
    if flags is not None and (len(flags) < depth or any(flag not in (0, 1) for flag in flags)):
        yield f"no_rope_layers {flags!r}: must have 0 or 1 for each of num_hidden_layers {depth}"
    if config["no_rope_layer_interval"] < 1:
        yield f"no_rope_layer_interval {config['no_rope_layer_interval']}: must be at least 1"


def _enables_window(config: dict[str, Any]) -> bool:
    """Return whether a config.json states a window that its class applies to some layers."""
    if config["model_type"] == "llama":
        return False
    return bool(
        (config["model_type"] == "mistral" or config.get("use_sliding_window")) and config.get("sliding_window")
    )


def _windows(config: dict[str, Any]) -> tuple[int, ...]:
    """Return the number of tokens that each layer attends to; 0: all."""
    depth = config["num_hidden_layers"]
    if not _enables_window(config):
        return (0,) * depth
    window = config["sliding_window"]
    if config["model_type"] == "mistral":
        return (window,) * depth
    if types := config.get("layer_types"):
        slides = [kind == "sliding_attention" for kind in types]
    elif config["model_type"] == "smollm3":
        nope_layers = _nope_layers(config)
        slides = [layer in nope_layers for layer in range(depth)]
    else:
        slides = [layer >= config["max_window_layers"] for layer in range(depth)]
    return tuple(window if slide else 0 for slide in slides)


def _nope_layers(config: dict[str, Any]) -> tuple[int, ...]:
    """Return the layers without rotary positions."""
    if config["model_type"] != "smollm3":
        return ()
    depth, flags = config["num_hidden_layers"], config.get("no_rope_layers")
    if flags is None:
        return tuple(layer for layer in range(depth) if (layer + 1) % config["no_rope_layer_interval"] == 0)
    return tuple(layer for layer in range(depth) if not flags[layer])
