"""Test the bundles of options that `model.recipe` selects."""

import tomllib

import pytest

from slm_jax.config.recipes import RECIPES, with_recipe
from slm_jax.config.schema import Config, ModelConfig
from slm_jax.utils.errors import UserError


def test_standard_changes_nothing():
    assert Config.load("quickstart", **{"model.recipe": "standard"}) == Config.load("quickstart")
    assert with_recipe({"model": {"recipe": "standard"}}) == {"model": {"recipe": "standard"}}


@pytest.mark.parametrize(("depth", "layers"), [(1, (0,)), (4, (1, 3)), (5, (0, 2, 4))])
def test_speedrun_sets_its_options(depth, layers):
    model = Config.load("quickstart", **{"model.recipe": "speedrun", "model.depth": depth}).model
    assert {name: getattr(model, name) for name in RECIPES["speedrun"]} == RECIPES["speedrun"]
    assert model.value_embeddings == layers
    changed = {*RECIPES["speedrun"], "value_embeddings", "recipe", "depth"}
    standard = Config.load("quickstart").model
    assert {n for n in ModelConfig.model_fields if getattr(model, n) != getattr(standard, n)} <= changed


def test_explicit_options_override_the_recipe():
    options = {
        "model.recipe": "speedrun",
        "model.mlp": "swiglu",
        "model.value_embeddings": [],
        "model.logit_softcap": 0,
    }
    model = Config.load("quickstart", **options).model
    assert (model.mlp, model.value_embeddings, model.logit_softcap) == ("swiglu", (), 0)
    assert model.attention_gate


def test_the_saved_config_is_resolved(monkeypatch):
    config = Config.load("quickstart", **{"model.recipe": "speedrun"})
    monkeypatch.setitem(RECIPES, "speedrun", {"logit_softcap": 99.0})
    assert Config.from_tree(tomllib.loads(config.to_toml())) == config


def test_invalid_values_are_reported_as_without_a_recipe():
    with pytest.raises(UserError, match=r"model\.recipe = 'fast'"):
        Config.load("quickstart", **{"model.recipe": "fast"})
    with pytest.raises(UserError, match=r"model\.depth = 'four'"):
        Config.load("quickstart", **{"model.recipe": "speedrun", "model.depth": "four"})
