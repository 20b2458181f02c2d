"""The options that a sweep varies, and the settings that it tries."""

import math

import pytest

from slm_jax.cli.sweep import convert_word
from slm_jax.sweep.axes import Axis, parse_axis, settings
from slm_jax.utils.errors import UserError


def axes_of(*texts):
    return [parse_axis(text, convert_word) for text in texts]


def values_of(found):
    return [dict(setting.values) for setting in found]


def test_all_combinations():
    found = settings(
        axes_of("optimizer.lr=0.01,0.03", "model.dim+model.heads=64+2, 96+3", "model.tie_weights=True,False")
    )
    assert values_of(found) == [
        {"optimizer.lr": lr, "model.dim": dim, "model.heads": heads, "model.tie_weights": tied}
        for lr in (0.01, 0.03)
        for dim, heads in ((64, 2), (96, 3))
        for tied in (True, False)
    ]
    assert found[0].label == "lr 0.01, dim 64, heads 2, tie_weights True"
    assert len({setting.folder for setting in found}) == 8


def test_folders_differ_where_the_values_look_alike():
    found = settings(axes_of("data.source=a/b,a_b,a b"))
    assert len({setting.folder for setting in found}) == 3
    assert all("/" not in setting.folder for setting in found)


def test_random_settings_can_be_continued():
    axes = axes_of("optimizer.lr=0.001..0.1", "model.dropout=0,0.1", "train.batch_size=4..64")
    found = values_of(settings(axes, 200, seed=3))
    assert found[:20] == values_of(settings(axes, 20, seed=3))
    assert found[:20] != values_of(settings(axes, 20, seed=4))
    rates = [setting["optimizer.lr"] for setting in found]
    assert all(0.001 <= rate <= 0.1 and len(f"{rate:.3g}") >= len(str(rate)) - 4 for rate in rates)
    # Uniform in the logarithm: half of the values below the geometric mean, within 4 standard deviations.
    assert abs(sum(rate < 0.01 for rate in rates) - 100) < 4 * math.sqrt(50)
    assert {type(setting["train.batch_size"]) for setting in found} == {int}
    assert {setting["model.dropout"] for setting in found} == {0.0, 0.1}


def test_no_random_setting_is_tried_twice():
    axes = axes_of("model.depth=1,2,3", "model.dropout=0,0.1")
    found = values_of(settings(axes, 6))
    assert len({tuple(setting.items()) for setting in found}) == 6
    with pytest.raises(UserError, match="--random 7: there are only 6 different settings"):
        settings(axes, 7)


@pytest.mark.parametrize("text", ["optimizer.lr=0.00123..0.00124", "train.steps=3..4"])
def test_drawn_values_stay_in_their_range(text):
    (axis,) = axes_of(text)
    low, high = axis.bounds
    for setting in settings([axis], 2):
        assert low <= next(iter(setting.values.values())) <= high


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lr", "give an option and its values"),
        ("optimizer.lr=", "give an option and its values"),
        ("lr=0.1,0.2", "unknown key lr, perhaps you meant optimizer.lr"),
        ("optimizer.lr=0.1,fast", "--optimizer.lr fast: should be a number"),
        ("model.dim+model.heads=64+2,96", "96 has 1 values for 2 options"),
        ("optimizer.lr=0.1,0.10", "a value is given twice"),
        ("optimizer.lr=0.1..0.01", "a range is NAME=LOW..HIGH"),
        ("model.dim+model.heads=64..128", "a range is NAME=LOW..HIGH"),
        ("optimizer.name=0.1..0.2", "optimizer.name is not a number"),
        ("train.seed=1,2", "the seed is varied with --seeds"),
        ("data.files=a,b", "data.files is a list"),
        ("model.recipe=standard,speedrun", "give --model.recipe to the whole sweep"),
    ],
)
def test_invalid_axes(text, message):
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        parse_axis(text, convert_word)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "nothing is varied"),
        (["model.dim=64,96", "model.dim+model.heads=64+2"], "model.dim is given twice"),
        (["optimizer.lr=0.01..0.1"], "a range needs --random N"),
    ],
)
def test_invalid_combinations_of_axes(texts, message):
    with pytest.raises(UserError, match=message):
        settings(axes_of(*texts))


def test_an_axis_of_one_value_is_allowed():
    assert settings([Axis(("model.dim",), ((64,),))])[0].values == {"model.dim": 64}
