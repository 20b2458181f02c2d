"""The rule from a size and a budget to options: monotone, valid, and as large and as expensive as was asked."""

import itertools
import math

import pytest

from slm_jax.config import rule, small_text
from slm_jax.config.rule import Request, make_recipe
from slm_jax.config.schema import Config
from slm_jax.config.training_length import AUTO_EPOCHS
from slm_jax.utils.errors import UserError

SIZES = [1.3e5 * 1.1**i for i in range(101)]  # up to 1.8 B
BUDGETS = [1e12 * 2**i for i in range(28)]


def values(request):
    return {name: choice.value for name, choice in make_recipe(request).options.items()}


def config_of(options):
    tree = {}
    for name, value in options.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    return Config.from_tree(tree)  # raises for invalid values, and for those that do not fit together


@pytest.mark.parametrize("size", [*SIZES[::4], 10e6, 30e6, 125e6, 350e6, 1e9, 20e9])
def test_a_size_is_met_and_its_options_are_valid(size):
    from slm_jax.performance import flops

    recipe = make_recipe(Request(parameters=size))
    config = config_of(values(Request(parameters=size)))
    assert recipe.parameters == pytest.approx(size, rel=0.05)
    assert recipe.parameters == flops.parameters(config.model, config.tokenizer.vocab_size)
    train = config.train
    per_token = flops.train_flops_per_token(config.model, config.tokenizer.vocab_size, train.sequence_length)
    assert recipe.flops == pytest.approx(recipe.tokens * per_token)
    assert recipe.tokens == train.steps * train.batch_size * train.sequence_length
    assert recipe.tokens == pytest.approx(rule.TOKENS_PER_PARAMETER * recipe.parameters, rel=0.05)
    assert config.optimizer.warmup_steps < train.steps / 2
    assert all(choice.reason for choice in recipe.options.values())


def test_a_larger_size_has_no_smaller_width_and_more_tokens():
    recipes = [make_recipe(Request(parameters=size)) for size in SIZES]
    for smaller, larger in itertools.pairwise(recipes):
        assert smaller.parameters < larger.parameters
        assert smaller.tokens < larger.tokens
        assert smaller.flops < larger.flops
        for name in ("model.dim", "tokenizer.vocab_size", "train.sequence_length"):
            assert smaller.options[name].value <= larger.options[name].value


@pytest.mark.parametrize("given", [{}, {"parameters": 5e5}])
def test_a_budget_is_spent(given):
    recipes = [make_recipe(Request(flops=budget, **given)) for budget in BUDGETS]
    for budget, recipe in zip(BUDGETS, recipes, strict=True):
        assert recipe.flops == pytest.approx(budget, rel=0.1)
    for smaller, larger in itertools.pairwise(recipes):
        assert smaller.tokens < larger.tokens
        assert smaller.parameters <= larger.parameters


def test_a_budget_alone_is_spent_on_twenty_tokens_per_parameter():
    for budget in BUDGETS[6:]:
        recipe = make_recipe(Request(flops=budget))
        assert recipe.tokens / recipe.parameters == pytest.approx(20, rel=0.15)
    recipe = make_recipe(Request(tokens=2e9))
    assert recipe.parameters == pytest.approx(1e8, rel=0.05)
    assert recipe.tokens == pytest.approx(2e9, rel=0.05)


@pytest.mark.parametrize(
    "given",
    [
        {"model.depth": 6},
        {"model.dim": 256},
        {"model.heads": 5},
        {"model.mlp_dim": 1024},
        {"model.tie_weights": False},
        {"tokenizer.vocab_size": 1000},
        {"train.sequence_length": 100, "train.batch_size": 7},
    ],
)
def test_given_options_are_kept_and_the_others_follow(given):
    recipe = make_recipe(Request(parameters=10e6, given=given))
    options = {name: choice.value for name, choice in recipe.options.items()}
    assert not given.keys() & options.keys()
    config = config_of({**options, **given})
    assert recipe.parameters == pytest.approx(10e6, rel=0.1)  # a given mlp_dim leaves whole blocks only
    assert recipe.tokens == config.train.steps * config.train.batch_size * config.train.sequence_length


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model.dim": 64, "model.depth": 4}, "4 blocks of width 64 need an inner width of 12,.* 200 times the width"),
        ({"model.dim": 64}, r"parameters of width 64 need 20\d blocks: give a larger --model.dim \(such as 384\)"),
    ],
)
def test_a_width_that_is_absurd_for_the_size_is_refused(given, message):
    """Otherwise one quantity takes all parameters, and a long training is wasted."""
    for budget in ({"parameters": 10e6}, {"tokens": 200e6}):
        with pytest.raises(UserError, match=message):
            make_recipe(Request(**budget, vocab_size=2048, given=given))
    assert make_recipe(Request(parameters=10e6, given={"model.depth": 9, **given, "model.mlp_dim": 256}))


@pytest.mark.parametrize("given", [{}, {"model.dim": 64}])
def test_many_blocks_are_kept_where_the_vocabulary_leaves_no_wider_model(given):
    """A published tokenizer in a small model: a width of 128 alone takes 6.4 M parameters."""
    recipe = make_recipe(Request(parameters=5e6, vocab_size=50257, given=given))
    assert recipe.options["model.depth"].value > 32


def test_the_options_to_change_are_those_given_and_the_vocabulary():
    with pytest.raises(UserError, match=r"change --model\.depth, --size or --budget, or the vocabulary of 50,000"):
        make_recipe(Request(parameters=5e6, vocab_size=50_000, given={"model.depth": 6}))


def test_the_proposed_width_suits_the_given_heads():
    with pytest.raises(UserError, match=r"a larger --model.dim \(such as 380\)"):
        make_recipe(Request(parameters=10e6, vocab_size=2048, given={"model.dim": 60, "model.heads": 10}))


@pytest.mark.parametrize("size", SIZES[::4])
def test_every_shape_of_a_given_depth_or_width_is_plausible_or_refused(size):
    for given in [{"model.depth": 2**i} for i in range(7)] + [{"model.dim": 2**i} for i in range(6, 12)]:
        try:
            recipe = make_recipe(Request(parameters=size, given=given))
        except UserError:
            continue
        model = {**{name: choice.value for name, choice in recipe.options.items()}, **given}
        ratio = 2 / 3 * model["model.mlp_dim"] / model["model.dim"]
        assert ratio <= 16
        assert "model.depth" in given or model["model.depth"] <= max(2, model["model.dim"] / 2)
        assert any("times the width" in note for note in recipe.notes) == (ratio > 8)


def test_a_small_text_is_read_at_most_four_times():
    text = 5_000_000
    for request in (Request(parameters=10e6, text_bytes=text), Request(flops=1e16, text_bytes=text)):
        recipe = make_recipe(request)
        tokens = rule.text_tokens(text, recipe.options["tokenizer.vocab_size"].value)
        assert recipe.tokens == pytest.approx(rule.MAX_EPOCHS * tokens, rel=0.1)
    assert any("not used up" in note for note in recipe.notes)
    both = make_recipe(Request(parameters=10e6, flops=1e16, text_bytes=text))  # as was asked, with a warning
    assert both.flops == pytest.approx(1e16, rel=0.05)
    assert any("overfit" in note for note in both.notes)


@pytest.mark.parametrize("text", [1e5, 1e6, 5e6, 1e7])
def test_a_small_text_gets_a_small_model_and_a_stop(text):
    recipe = make_recipe(Request(auto=True, text_bytes=int(text)))
    options = {name: choice.value for name, choice in recipe.options.items()}
    tokens = rule.text_tokens(int(text), options["tokenizer.vocab_size"])
    assert recipe.parameters == pytest.approx(small_text.auto_parameters(int(text)), rel=0.05)
    assert recipe.tokens == pytest.approx(min(AUTO_EPOCHS * tokens, 20 * recipe.parameters), rel=0.1)
    assert options["train.stop_early"] == small_text.AUTO_STOP_EARLY
    assert config_of(options).model.dropout == small_text.AUTO_DROPOUT
    larger = make_recipe(Request(auto=True, text_bytes=int(2 * text)))
    assert larger.parameters > recipe.parameters or recipe.parameters < 1.1 * small_text.MIN_AUTO_PARAMETERS
    assert larger.tokens > recipe.tokens


@pytest.mark.parametrize(("request_", "epochs"), [({"text_bytes": 10**9}, "1."), ({"flops": 1e12}, "0.")])
def test_a_text_that_is_not_read_often_has_no_dropout(request_, epochs):
    recipe = make_recipe(Request(auto=True, **{"text_bytes": 10**6, **request_}))
    assert recipe.options["model.dropout"].value == 0
    assert f"the text is read about {epochs}" in recipe.options["model.dropout"].reason


def test_whole_steps_do_not_decide_about_dropout():
    shape = {"model.dim": 96, "model.heads": 2, "model.depth": 3, "model.mlp_dim": 150, "train.sequence_length": 64}
    base = {"auto": True, "tuned": True, "vocab_size": 320, "bytes_per_token": 1.3, "given": shape}
    for text in range(50_000, 150_000, 10_007):
        choice = make_recipe(Request(text_bytes=text, **base)).options["model.dropout"]
        assert choice.value == 0, choice.reason


def test_an_existing_tokenizer_is_kept():
    recipe = make_recipe(Request(parameters=30e6, vocab_size=16_384))
    assert "tokenizer.vocab_size" not in recipe.options
    assert recipe.parameters == pytest.approx(30e6, rel=0.05)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(parameters=3), "no model of 3 parameters"),
        (Request(parameters=1e6, vocab_size=32_768), "give a larger --size"),
        (Request(parameters=1e12), "too many"),
        (Request(flops=1e6), "too small for one step"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(request_, message):
    with pytest.raises(UserError, match=message) as error:
        make_recipe(request_)
    assert "\n" not in str(error.value)


def test_batches_are_round_and_grow_with_the_tokens():
    sizes = [rule.batch_sequences(1e5 * 1.3**i, 256) for i in range(50)]
    assert sizes == sorted(sizes)
    assert all(size % 8 == 0 or size in (1, 2, 4) for size in sizes)
    assert all(math.log2(size).is_integer() or math.log2(size / 3).is_integer() for size in sizes)


def test_the_learning_rate_is_a_power_law():
    """Against its closed form, and with the direction of each argument."""
    rate = rule.learning_rate(256, 4096, 1000)
    assert rate == pytest.approx(0.005 * (256 / 128) ** -0.75 * (4096 / 512) ** 0.25 * (1000 / 300) ** -0.33, rel=0.03)
    assert rule.learning_rate(128, 512, 300) == 0.005
    assert rule.learning_rate(512, 4096, 1000) < rate < rule.learning_rate(128, 4096, 1000)
    assert rule.learning_rate(256, 1024, 1000) < rate < rule.learning_rate(256, 16_384, 1000)
    assert rule.learning_rate(256, 4096, 4000) < rate < rule.learning_rate(256, 4096, 250)


def test_epochs_and_tokens_per_parameter_are_those_that_training_expects():
    from slm_jax.training import expectation

    assert expectation.MAX_EPOCHS == rule.MAX_EPOCHS
    assert expectation.TOKENS_PER_PARAMETER == rule.TOKENS_PER_PARAMETER
