"""The model's shape as `config.json` of a stock class of `transformers`, and back.

Three classes compute what `slm_jax.model.transformer` does; which one depends on two options:

    qk_norm True                Qwen3     RMSNorm on queries and keys per head; a sliding window in every layer or none
    qk_norm False, window       Mistral   a sliding window in every layer
    qk_norm False, no window    Llama

All three turn the channel pairs (i, i + K/2) of a head, group query heads in order, have no biases where their
configuration says so, and count a window as we do: `sliding_window` tokens, the querying one included.
"""

from collections.abc import Iterator
from typing import Any

from slm_jax.config.option import traits_of
from slm_jax.config.schema import ModelConfig
from slm_jax.model.transformer import swiglu_width
from slm_jax.utils.errors import UserError

CLASSES = {"qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}


def to_config_json(model: ModelConfig, vocab_size: int, length: int, dtype: str) -> dict[str, Any]:
    """config.json of a model trained at a sequence length. Raises UserError that names what no class has.

    vocab_size: rows of the embedding; the padding rows of `vocab_multiple` are left out.
    """
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if not traits_of(field) & {"exported", "execution", "training_only"} and value != field.default:
            raise UserError(f"model.{name} = {value}: no architecture that the export writes has it")
    kind = "qwen3" if model.qk_norm else "mistral" if model.window else "llama"
    special = {"bos_token_id": 5, "eos_token_id": 5, "pad_token_id": 0}  # tokenizer.vocabulary.SPECIAL_TOKENS
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
        # The name of either generation of transformers; both read their own.
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_weights,
        # A cache keeps the window without the querying token; that of a window of 1 would be all instead of nothing.
        "use_cache": model.window != 1,
        "torch_dtype": dtype,
        **special,
    }
    if kind == "qwen3":
        config |= {"use_sliding_window": bool(model.window), "sliding_window": model.window or None}
        config |= {"max_window_layers": 0 if model.window else model.depth}
        config["layer_types"] = ["sliding_attention" if model.window else "full_attention"] * model.depth
    elif kind == "mistral":
        config["sliding_window"] = model.window
        del config["attention_bias"]  # it has none to leave out
    else:
        config["mlp_bias"] = False
    return config


def from_config_json(config: dict[str, Any], name: str) -> tuple[dict[str, Any], int]:
    """(fields of `model.*`, rows of the embedding) of a config.json. Raises UserError with all that we do not have."""
    problems = list(_unsupported(config))
    if problems:
        raise UserError(f"{name}: cannot be trained here:" + "".join(f"\n  - {problem}" for problem in problems))
    heads, inner = config["num_attention_heads"], config["intermediate_size"]
    return {
        "dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "mlp_dim": 3 * inner // 2,  # of which 2/3, rounded up, are the inner width again
        "mlp_multiple": 1,
        "window": _window(config),
        "tie_weights": config.get("tie_word_embeddings", False),
        "qk_norm": config["model_type"] == "qwen3",
        "norm_eps": _norm_eps(config),
        "rope_base": _rope(config)[1],
    }, config["vocab_size"]


_WHOLE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# What each of these must be where it is there.
_KINDS: dict[str, tuple[str, Any]] = {
    "num_key_value_heads": ("a whole number", int | None),
    "head_dim": ("a whole number", int | None),
    "sliding_window": ("a whole number", int | None),
    "max_window_layers": ("a whole number", int),
    "tie_word_embeddings": ("true or false", bool),
    "layer_types": ("a list", list | None),
    "rope_parameters": ("an object", dict | None),
    "rope_scaling": ("an object", dict | None),
}


def _unsupported(config: dict[str, Any]) -> Iterator[str]:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        yield f"model_type {kind!r}: one of {', '.join(CLASSES)} is needed"
        return
    if missing := [key for key in _WHOLE if not isinstance(config.get(key), int) or not 0 < config[key] < 2**31]:
        yield f"{', '.join(missing)}: should be a positive whole number"
        return
    if wrong := [key for key in config.keys() & _KINDS if not isinstance(config[key], _KINDS[key][1])]:
        yield from (f"{key}: should be {_KINDS[key][0]}" for key in sorted(wrong))
        return
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    # 128 is what the class takes where the file says nothing.
    width = config.get("head_dim") or (128 if kind == "qwen3" and "head_dim" not in config else dim // heads)
    if width * heads != dim:
        yield f"head_dim {width}: only hidden_size / num_attention_heads = {dim / heads:g}"
    elif width % 2:
        yield f"head_dim {width} is odd, but rotary positions pair the channels of a head"
    if kv_heads < 1 or heads % kv_heads:
        yield f"num_key_value_heads {kv_heads}: a divisor of num_attention_heads {heads} is needed"
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act {config['hidden_act']!r}: only silu"
    if not _is_number(_norm_eps(config), above=0):
        yield f"rms_norm_eps {_norm_eps(config)!r}: a number above 0 is needed"
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            yield f"{key} {config[key]}: no biases"
    yield from _unsupported_rope(config)
    if config.get("quantization_config"):
        yield "quantization_config: only weights as they are"
    layers = set(map(str, config.get("layer_types") or ()))
    depth, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
    mixed = len(layers) > 1 or (not layers and kind == "qwen3" and _has_window(config) and 0 < first < depth)
    if mixed or layers - {"full_attention", "sliding_attention"}:
        yield f"layer_types {sorted(layers) or 'by max_window_layers'}: all layers alike, with a window or without"


def _unsupported_rope(config: dict[str, Any]) -> Iterator[str]:
    kind, base = _rope(config)
    if kind != "default":
        yield f"rotary positions of type {kind!r}: only default, without scaling"
    elif unknown := sorted(_rope_settings(config).keys() - {"rope_type", "type", "rope_theta"}):
        yield f"rope_parameters with {unknown[0]!r}: only rope_type and rope_theta, for all layers alike"
    if config.get("partial_rotary_factor", 1) not in (1, None):
        yield f"partial_rotary_factor {config['partial_rotary_factor']!r}: only 1, all channels of a head"
    if not _is_number(base, above=1):
        yield f"rope_theta {base!r}: a number above 1 is needed"


def _is_number(value: object, above: float) -> bool:
    return isinstance(value, int | float) and above < value < 1e30


def _norm_eps(config: dict[str, Any]) -> Any:
    return config.get("rms_norm_eps", 1e-6)  # what each class takes where the file says nothing


def _has_window(config: dict[str, Any]) -> bool:
    if config["model_type"] == "llama":
        return False
    on = config["model_type"] == "mistral" or config.get("use_sliding_window", False)
    return bool(on and config.get("sliding_window", 4096))


def _window(config: dict[str, Any]) -> int:
    """Tokens that every layer sees; 0: all."""
    if not _has_window(config):
        return 0
    if config["model_type"] == "qwen3":
        layers = config.get("layer_types")
        full = "full_attention" in layers if layers else config.get("max_window_layers", 28) > 0
        if full:
            return 0
    return config.get("sliding_window", 4096)


def _rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """As either generation of transformers writes them; both take rope_scaling where it is there."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rope(config: dict[str, Any]) -> tuple[Any, Any]:
    """(type of the rotary positions, their base)."""
    settings = _rope_settings(config)
    base = settings.get("rope_theta") or config.get("rope_theta") or 10_000.0
    return settings.get("rope_type") or settings.get("type") or "default", base
