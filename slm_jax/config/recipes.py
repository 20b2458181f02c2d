"""Recipes: bundles of model options that `model.recipe` selects.

A recipe gives values to options that neither the preset nor an override names. They are resolved when the config is
loaded and saved with it, so that a run does not depend on what a later version puts into a recipe.
"""

from typing import Any

import pydantic

from slm_jax.config.model_section import ModelConfig
from slm_jax.utils.errors import UserError

RECIPES: dict[str, dict[str, Any]] = {
    "standard": {},
    # What the speed runs modded-nanogpt and nanochat add to a Transformer with RMSNorm, QK norm and rotary positions.
    "speedrun": {
        "mlp": "relu2",
        "output_init": "zero",
        "logit_softcap": 15.0,
        "residual_scales": True,
        "attention_gate": True,
        # and value_embeddings in every other layer, the last one included, as in nanochat: `_value_layers`
    },
}


def with_recipe(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a config given as nested dicts with the options of its `model.recipe`; explicit values stay.

    Args:
        tree: Values by section and option. Invalid ones are left to the validation.
    """
    model = tree.get("model")
    recipe = model.get("recipe") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(recipe, str) or not RECIPES.get(recipe):
        return tree
    layers = {} if "value_embeddings" in model else _value_layers(model)
    return {**tree, "model": {**RECIPES[recipe], **layers, **model}}


def overridable(section: dict[str, Any], overrides: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return the section `model` of a config such that overrides of recipe and depth have their effect.

    The config of a run names all options, those of its recipe included. Layers that followed from its depth are left
    out where the depth changes, so that they follow from the new one.

    Args:
        section: The section of the preset, run or sweep below the overrides.
        overrides: The given options of the section.
        origin: Source of the section, named in the error message.

    Raises:
        UserError: The recipe is another one, and the section names all options that recipes set.
    """
    default = ModelConfig.model_fields["recipe"].default
    old = section.get("recipe", default)
    new = overrides.get("recipe", old)
    names = {"value_embeddings", *(name for options in RECIPES.values() for name in options)}
    if new != old and names <= section.keys() and names - overrides.keys():
        listed = ", ".join(f"--model.{name}" for name in sorted(names))
        raise UserError(
            f"model.recipe {new}: {origin} has the recipe {old} and names all options, so another recipe has no "
            f"effect: start from a preset, or give the options themselves ({listed})"
        )
    follows = _value_layers(section).get("value_embeddings") if RECIPES.get(str(old)) else None
    saved = section.get("value_embeddings")
    if "depth" in overrides and follows is not None and isinstance(saved, list | tuple) and tuple(saved) == follows:
        return {name: value for name, value in section.items() if name != "value_embeddings"}
    return section


def _value_layers(model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the option `value_embeddings` with every other layer, the last one included.

    Nothing for a depth that the validation reports.
    """
    given = model.get("depth", ModelConfig.model_fields["depth"].default)
    try:
        depth = pydantic.TypeAdapter(int).validate_python(given)  # as the validation reads it: "6" is 6
    except pydantic.ValidationError:
        return {}
    return {"value_embeddings": tuple(range((depth - 1) % 2, depth, 2))}
