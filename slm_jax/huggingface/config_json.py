"""`config.json` of the stock transformers classes to and from the `model.*` options.

Three classes compute what `slm_jax.model.transformer` computes; two options decide which:

    qk_norm True                Qwen3     RMSNorm on queries and keys per head; a sliding window in all layers or none
    qk_norm False, window       Mistral   a sliding window in all layers
    qk_norm False, no window    Llama

All three rotate the channel pairs (i, i + K/2) of a head, assign query heads to key/value heads in order, have no
biases if so configured, and define a window as this project does: `sliding_window` tokens, the querying one included.
"""

from collections.abc import Iterator
from typing import Any

from slm_jax.config.option import traits_of
from slm_jax.config.schema import ModelConfig
from slm_jax.model.transformer import swiglu_width
from slm_jax.utils.errors import UserError
from tokenizer.vocabulary import SPECIAL_TOKENS

CLASSES = {"qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}

PAD_ID = SPECIAL_TOKENS.index("<PAD>")
EOS_ID = SPECIAL_TOKENS.index("<EOS>")

# What transformers assumes if a config.json does not say.
_DEFAULT_NORM_EPS = 1e-6
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28
_DEFAULT_QWEN3_HEAD_DIM = 128
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen3": 32}  # Llama: as many as heads


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
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if not traits_of(field) & {"exported", "execution", "training_only"} and value != field.default:
            raise UserError(f"model.{name} = {value}: no exported architecture supports it")
    kind = _architecture(model)
    config: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.dim // model.heads,
        "intermediate_size": swiglu_width(model),
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "initializer_range": 0.02,
        "rms_norm_eps": model.norm_eps,
        # transformers 4 reads the first, transformers 5 the second.
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
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
    if kind == "qwen3":
        config["use_sliding_window"] = bool(model.window)
        config["sliding_window"] = model.window or None
        config["max_window_layers"] = 0 if model.window else model.depth
        config["layer_types"] = ["sliding_attention" if model.window else "full_attention"] * model.depth
    elif kind == "mistral":
        config["sliding_window"] = model.window
        del config["attention_bias"]  # not an option of Mistral
    else:
        config["mlp_bias"] = False
    return config


def _architecture(model: ModelConfig) -> str:
    """Return the key in `CLASSES` of the class that computes a model."""
    if model.qk_norm:
        return "qwen3"
    return "mistral" if model.window else "llama"


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
    problems = list(_unsupported(config))
    if problems:
        raise UserError(f"{name}: this model is not supported:" + "".join(f"\n  - {problem}" for problem in problems))
    heads = config["num_attention_heads"]
    options = {
        "dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": _kv_heads(config),
        # The inner width is 2/3 of mlp_dim, rounded up: this mlp_dim gives the same width again.
        "mlp_dim": 3 * config["intermediate_size"] // 2,
        "mlp_multiple": 1,
        "window": _window(config),
        "tie_weights": config.get("tie_word_embeddings", False),
        "qk_norm": config["model_type"] == "qwen3",
        "norm_eps": _norm_eps(config),
        "rope_base": _rope(config)[1],
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
    "max_window_layers": ("an integer", int),
    "tie_word_embeddings": ("true or false", bool),
    "layer_types": ("a list", list | None),
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
    if wrong := [key for key in config.keys() & _TYPES if not isinstance(config[key], _TYPES[key][1])]:
        yield from (f"{key}: must be {_TYPES[key][0]}" for key in sorted(wrong))
        return
    yield from _unsupported_heads(config)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act {config['hidden_act']!r}: only silu is supported"
    if not _is_number(_norm_eps(config), above=0):
        yield f"rms_norm_eps {_norm_eps(config)!r}: must be a number above 0"
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            yield f"{key} {config[key]}: biases are not supported"
    yield from _unsupported_rope(config)
    if config.get("quantization_config"):
        yield "quantization_config: quantized weights are not supported"
    yield from _unsupported_layers(config)


def _unsupported_heads(config: dict[str, Any]) -> Iterator[str]:
    dim = config["hidden_size"]
    heads = config["num_attention_heads"]
    kv_heads = _kv_heads(config)
    width = config.get("head_dim")
    if not width:
        is_default = config["model_type"] == "qwen3" and "head_dim" not in config
        width = _DEFAULT_QWEN3_HEAD_DIM if is_default else dim // heads
    if width * heads != dim:
        yield f"head_dim {width}: must be hidden_size / num_attention_heads = {dim / heads:g}"
    elif width % 2:
        yield f"head_dim {width}: must be even, as rotary positions pair the channels of a head"
    if kv_heads < 1 or heads % kv_heads:
        yield f"num_key_value_heads {kv_heads}: must divide num_attention_heads {heads}"


def _kv_heads(config: dict[str, Any]) -> int:
    """Return the number of key/value heads; a class has a default for a missing key, not for null."""
    default = _DEFAULT_KV_HEADS.get(config["model_type"])
    return config.get("num_key_value_heads", default) or config["num_attention_heads"]


def _unsupported_layers(config: dict[str, Any]) -> Iterator[str]:
    """Yield a problem unless all layers have the same kind of attention."""
    types = {str(layer) for layer in config.get("layer_types") or ()}
    if not types and config["model_type"] == "qwen3" and _has_window(config):
        first = config.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
        mixed = 0 < first < config["num_hidden_layers"]
    else:
        mixed = len(types) > 1
    if mixed or types - {"full_attention", "sliding_attention"}:
        yield f"layer_types {sorted(types) or 'by max_window_layers'}: all layers must be alike, with a window or not"


def _unsupported_rope(config: dict[str, Any]) -> Iterator[str]:
    kind, base = _rope(config)
    if kind != "default":
        yield f"rotary positions of type {kind!r}: only default, without scaling, is supported"
    elif unknown := sorted(_rope_settings(config).keys() - {"rope_type", "type", "rope_theta"}):
        yield f"rope_parameters with {unknown[0]!r}: only rope_type and rope_theta, for all layers, are supported"
    if config.get("partial_rotary_factor", 1) not in (1, None):
        yield f"partial_rotary_factor {config['partial_rotary_factor']!r}: only 1, all channels of a head, is supported"
    if not _is_number(base, above=1):
        yield f"rope_theta {base!r}: must be a number above 1"


def _is_number(value: object, above: float) -> bool:
    return isinstance(value, int | float) and above < value < 1e30


def _norm_eps(config: dict[str, Any]) -> Any:
    return config.get("rms_norm_eps", _DEFAULT_NORM_EPS)


def _has_window(config: dict[str, Any]) -> bool:
    """Return whether any layer has a sliding window."""
    if config["model_type"] == "llama":
        return False
    enabled = config["model_type"] == "mistral" or config.get("use_sliding_window", False)
    return bool(enabled and config.get("sliding_window", _DEFAULT_WINDOW))


def _window(config: dict[str, Any]) -> int:
    """Return the number of tokens that every layer attends to; 0: all."""
    if not _has_window(config):
        return 0
    if config["model_type"] == "qwen3":
        if layers := config.get("layer_types"):
            full = "full_attention" in layers
        else:
            full = config.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS) > 0
        if full:
            return 0
    return config.get("sliding_window", _DEFAULT_WINDOW)


def _rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings under the key of transformers 4 or 5; both versions prefer rope_scaling if it is set."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rope(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return type and base of the rotary positions."""
    settings = _rope_settings(config)
    base = settings.get("rope_theta") or config.get("rope_theta") or _DEFAULT_ROPE_THETA
    return settings.get("rope_type") or settings.get("type") or "default", base
