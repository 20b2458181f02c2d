"""Test the bundles of options that `model.recipe` selects."""

import tomllib

import pytest

from slm_jax.cli.options import make_config
from slm_jax.config.recipes import RECIPES, with_recipe
from slm_jax.config.schema import Config, ModelConfig
from slm_jax.scaling.study import Study
from slm_jax.sweep.plan import Sweep
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


def saved(tmp_path, **overrides):
    """The path of a saved config, which names every option."""
    path = tmp_path / "config.toml"
    path.write_text(Config.load("quickstart", **overrides).to_toml())
    return path


@pytest.mark.parametrize("load", [lambda path, given: Config.load(path, **given), lambda *a: make_config(*a[::-1])])
@pytest.mark.parametrize(("old", "new"), [("standard", "speedrun"), ("speedrun", "standard")])
def test_another_recipe_than_that_of_a_saved_config_is_refused(load, old, new, tmp_path):
    path = saved(tmp_path, **{"model.recipe": old})
    with pytest.raises(UserError, match=rf"model\.recipe {new}: .* has the recipe {old} and names all options"):
        load(str(path), {"model.recipe": new})
    assert load(str(path), {"model.recipe": old}) == Config.load("quickstart", **{"model.recipe": old})


def test_layers_of_the_recipe_follow_another_depth(tmp_path):
    path = saved(tmp_path, **{"model.recipe": "speedrun"})
    assert Config.load(path, **{"model.depth": 6}).model.value_embeddings == (1, 3, 5)
    assert make_config({"model.depth": 3}, str(path)).model.value_embeddings == (0, 2)
    chosen = saved(tmp_path, **{"model.recipe": "speedrun", "model.value_embeddings": [1]})
    assert Config.load(chosen, **{"model.depth": 6}).model.value_embeddings == (1,)


def test_layers_of_the_recipe_follow_the_depths_of_a_sweep_and_a_study(tmp_path):
    base = Config.load("quickstart", **{"model.recipe": "speedrun"})
    trials = Sweep(base, ("model.depth=2,6",)).trials(tmp_path, lambda name, word: int(word))
    assert [trial.config.model.value_embeddings for trial in trials] == [(1,), (1, 3, 5)]
    for trial in Study(base, (1e13, 2e13), (300e3, 1e6, 4e6)).trials(tmp_path, 512):
        depth = trial.config.model.depth
        assert trial.config.model.value_embeddings == tuple(range((depth - 1) % 2, depth, 2))


def test_depth_is_read_as_the_validation_reads_it():
    for depth in ("6", 6.0):
        model = Config.load("quickstart", **{"model.recipe": "speedrun", "model.depth": depth}).model
        assert (model.depth, model.value_embeddings) == (6, (1, 3, 5))
