"""Recipes: bundles of model options that `model.recipe` selects.

A recipe gives values to options that neither the preset nor an override names. They are resolved when the config is
loaded and saved with it, so that a run does not depend on what a later version puts into a recipe.
"""

from typing import Any

from slm_jax.config.model_section import ModelConfig

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
    depth = model.get("depth", ModelConfig.model_fields["depth"].default)
    layers = _value_layers(depth) if isinstance(depth, int) else ()
    return {**tree, "model": {**RECIPES[recipe], "value_embeddings": layers, **model}}


def _value_layers(depth: int) -> tuple[int, ...]:
    """Return every other layer, the last one included."""
    return tuple(range((depth - 1) % 2, depth, 2))
