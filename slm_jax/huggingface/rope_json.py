"""Rotary positions in a `config.json` to and from the `model.rope_*` options.

transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; both prefer `rope_scaling` if it
is set.
"""

from collections.abc import Iterator
from typing import Any

from slm_jax.config.schema import ModelConfig
from slm_jax.model.rotary import yarn_scale

SCALINGS = ("default", "linear", "llama3", "yarn")
_DEFAULT_THETA = 10_000.0
_ORIGINAL_LENGTH = "original_max_position_embeddings"

# Keys of each type, other than those of its name and of the base, with the options of this project; None: see
# `rope_options`.
_KEYS: dict[str, dict[str, str | None]] = {
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        _ORIGINAL_LENGTH: "rope_original_length",
        "low_freq_factor": "rope_low_turns",
        "high_freq_factor": "rope_high_turns",
    },
    "yarn": {
        "factor": "rope_factor",
        _ORIGINAL_LENGTH: "rope_original_length",
        "beta_fast": "rope_high_turns",
        "beta_slow": "rope_low_turns",
        "attention_factor": "rope_attention_factor",
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": None,
    },
}
# Keys that a published config must have, since transformers has no default for them.
_REQUIRED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}


def to_rope_json(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of a config.json that describe the rotary positions of a model."""
    if model.rope_scaling == "none":
        return {
            "rope_theta": model.rope_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        }
    scaling: dict[str, Any] = {"rope_type": model.rope_scaling}
    for key, option in _KEYS[model.rope_scaling].items():
        if option and (value := getattr(model, option)):  # an attention factor of 0 is the default
            scaling[key] = value
    return {
        "rope_theta": model.rope_base,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": model.rope_base},
    }


def rope_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return the `model.rope_*` options of a config.json without `rope_problems`."""
    settings = _settings(config)
    kind = _type(settings)
    options: dict[str, Any] = {"rope_base": _base(config)}
    if kind == "default":
        return options
    options["rope_scaling"] = kind
    for key, option in _KEYS[kind].items():
        if option and settings.get(key) is not None:
            options[option] = settings[key]
    if kind in ("llama3", "yarn"):
        options["rope_original_length"] = _original_length(config)
    slope, slope_all = settings.get("mscale"), settings.get("mscale_all_dim")
    if kind == "yarn" and not settings.get("attention_factor") and slope and slope_all:
        factor = settings["factor"]
        options["rope_attention_factor"] = yarn_scale(factor, slope) / yarn_scale(factor, slope_all)
    return options


def rope_problems(config: dict[str, Any]) -> Iterator[str]:
    """Yield everything about the rotary positions of a config.json that is invalid or not supported."""
    settings = _settings(config)
    kind = _type(settings)
    if kind not in _KEYS:
        yield f"rotary positions of type {kind!r}: one of {', '.join(SCALINGS)} is supported"
        return
    supported = _KEYS[kind]
    for key in sorted(
        settings.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"} - supported.keys()
    ):
        keys = ", ".join(["rope_theta", *supported])
        yield f"rope_parameters with {key!r} {settings[key]!r}: for type {kind} {keys} are supported, for all layers"
    for holder in (config, settings):
        if (share := holder.get("partial_rotary_factor", 1)) not in (1, None):
            yield f"partial_rotary_factor {share!r}: only 1, all channels of a head, is supported"
    if not _is_number(_base(config), above=1):
        yield f"rope_theta {_base(config)!r}: must be a number above 1"
    for key in _REQUIRED.get(kind, ()):
        if key not in settings:
            yield f"rope_parameters: {key} is missing, which type {kind} needs"
    for key in supported.keys() & settings.keys():
        value = settings[key]
        if key == "truncate":
            if value is not True:
                yield f"rope_parameters: truncate {value!r}: only true is supported"
        elif value is not None and not _is_number(value, above=0):
            yield f"rope_parameters: {key} {value!r} must be a number above 0"
        elif key == "factor" and (value is None or value < 1):
            yield f"rope_parameters: factor {value!r} must be at least 1"
    if kind in ("llama3", "yarn") and not _is_length(_original_length(config)):
        yield f"rope_parameters: {_ORIGINAL_LENGTH} {_original_length(config)!r} must be a number of tokens"


def _is_number(value: object, above: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < 1e30


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings under the key of transformers 4 or 5."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _type(settings: dict[str, Any]) -> Any:
    return settings.get("rope_type") or settings.get("type") or "default"


def _base(config: dict[str, Any]) -> Any:
    return _settings(config).get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA


def _original_length(config: dict[str, Any]) -> Any:
    """Return the sequence length before the scaling; a key outside of the settings has priority."""
    places = (config.get(_ORIGINAL_LENGTH), _settings(config).get(_ORIGINAL_LENGTH))
    return next((value for value in places if value is not None), config.get("max_position_embeddings"))
