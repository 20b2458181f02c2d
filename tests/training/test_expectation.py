"""The line about text, model and steps before training: the rule, and proposals that follow it."""

import math
import random
import re

from slm_jax.config import rule
from slm_jax.config.rule import Request, make_recipe
from slm_jax.config.schema import Config
from slm_jax.training.expectation import expectation


def config_of(steps, **fields):
    return Config.load("quickstart", **{"train.steps": steps, **fields})


def test_a_small_text_is_likely_to_be_overfitted():
    """The 182 kB of plays that 300 steps of quickstart read 20.69 times."""
    line = expectation(config_of(300), 59_000, 300 / 20.69, 1_900_000)
    assert "are read 21 times" in line
    assert "likely to overfit. To change: --train.steps 57 (4 epochs), --model.dim 96 --model.mlp_dim 384" in line


def test_a_resumed_run_is_told_only_what_can_still_change():
    arguments = (59_000, 300 / 20.69, 1_900_000)
    line = expectation(config_of(300), *arguments, start=50)
    assert line.endswith("likely to overfit. To change: --train.steps 57 (4 epochs), --train.stop_early 2")
    line = expectation(config_of(300), *arguments, start=100)
    assert line.endswith("likely to overfit. To change: --train.stop_early 2")
    assert expectation(config_of(300, **{"train.stop_early": 3}), *arguments, start=100).endswith("likely to overfit")


def test_the_recipe_for_small_texts_is_not_warned_of():
    """A text of 150 kB with --size auto, whose options are those of the rule."""
    recipe = make_recipe(Request(auto=True, text_bytes=150_000))
    options = {name: choice.value for name, choice in recipe.options.items()}
    config = Config.load("quickstart", **options)
    tokens = rule.text_tokens(150_000, config.tokenizer.vocab_size)
    per_epoch = tokens / (config.train.batch_size * config.train.sequence_length)
    for factor in (0.9, 1.1):  # the text has more or fewer tokens than estimated
        line = expectation(config, round(tokens * factor), per_epoch * factor, round(recipe.parameters))
        assert line.endswith("model.dropout 0.1 and train.stop_early 2 guard against overfitting"), line
    for name, value in (("model.dropout", 0.0), ("train.stop_early", 0), ("train.steps", 9 * config.train.steps)):
        other = Config.load("quickstart", **{**options, name: value})
        assert "likely to overfit" in expectation(other, round(tokens), per_epoch, round(recipe.parameters))


def test_the_default_preset_fits_its_text():
    line = expectation(config_of(500), 699_205, 170.7, 1_970_000)
    assert "overfit" not in line
    assert "up to about --train.steps 682 (4 epochs)" in line


def test_verdicts_follow_the_rule_and_following_one_ends_it():
    rng = random.Random(0)
    seen = set()
    for _ in range(500):
        tokens = 10 ** rng.uniform(4, 9)
        parameters = 10 ** rng.uniform(5, 8)
        per_epoch = tokens / 4096
        steps = max(1, round(per_epoch * 10 ** rng.uniform(-2, 2)))
        line = expectation(config_of(steps), round(tokens), per_epoch, round(parameters))
        epochs, trained = steps / per_epoch, steps * 4096 / parameters
        if "overfit" in line:
            assert epochs > 4
            assert tokens / parameters < 20
        elif "still improve" in line:
            assert epochs < 4
            assert trained < 20
        else:
            assert epochs > 3 or trained > 15 or steps <= 2
            continue
        seen.add("overfit" in line)
        changed = int(re.search(r"--train.steps (\d+)", line)[1])
        again = expectation(config_of(changed), round(tokens), per_epoch, round(parameters))
        assert "text, model and steps fit" in again, (line, again)
        assert changed <= math.ceil(4 * per_epoch)
    assert seen == {True, False}


def test_a_fine_tuned_model_is_not_told_to_train_longer():
    assert "still improve" in expectation(config_of(10), 10**6, 244.0, 10**6)
    assert "still improve" not in expectation(config_of(10, **{"init.from_run": "runs/a"}), 10**6, 244.0, 10**6)
