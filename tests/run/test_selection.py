"""The checkpoint that a command works with: best, last, a given step, and the default."""

import json
import math
import random

import jax.numpy as jnp
import pytest

from slm_jax.config.schema import CheckpointConfig
from slm_jax.run.checkpoint import Checkpoints
from slm_jax.run.directory import Run
from slm_jax.run.selection import SavedCheckpoint, list_checkpoints, select_checkpoint
from slm_jax.run.trend import Trend, Validation
from slm_jax.utils.errors import UserError


def make_run(path, validations, saves, stores_trend=True):
    """Save tiny checkpoints as training does.

    Args:
        path: The run directory.
        validations: Bits per byte by step.
        saves: The steps with a checkpoint; all of them are kept.
        stores_trend: Whether checkpoints hold the trend, as those of earlier versions do not.
    """
    run = Run(path)
    trend = Trend()
    rows = []
    with Checkpoints(run.checkpoints, CheckpointConfig(keep=len(saves))) as checkpoints:
        for step in range(1, max(saves) + 1):
            row = {"step": step, "loss": 1.0}
            if step in validations:
                trend = trend.add(step, 2 * validations[step], validations[step])
                row |= {"val_loss": 2 * validations[step], "val_bits_per_byte": validations[step]}
            rows.append(row)
            if step in saves:
                position = {"validation": trend.to_json()} if stores_trend else {}
                checkpoints.save(step, {"x": jnp.full((2,), step)}, position, validations.get(step))
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture(scope="module")
def rising(tmp_path_factory):
    """A run whose validation rises from step 2 on."""
    return make_run(tmp_path_factory.mktemp("rising"), {2: 1.5, 4: 2.0}, [2, 3, 5])


def test_checkpoints_are_listed_with_their_scores(rising, tmp_path):
    assert list_checkpoints(rising) == [
        SavedCheckpoint(2, 3.0, 1.5, is_best=True, is_last=False),
        SavedCheckpoint(3, None, None, is_best=False, is_last=False),
        SavedCheckpoint(5, None, None, is_best=False, is_last=True),
    ]
    assert list_checkpoints(Run(tmp_path / "none")) == []
    earlier = make_run(tmp_path / "earlier", {2: 1.5, 3: 1.7}, [2, 3], stores_trend=False)
    assert [each.loss for each in list_checkpoints(earlier)] == [3.0, 3.4]  # of metrics.jsonl


def test_the_best_is_the_default_where_validation_does_not_improve(rising, tmp_path):
    chosen = select_checkpoint(rising)
    assert chosen.candidates == (2, 5, 3)
    assert chosen.describe(2) == "step 2 (best; last is 5)"
    assert select_checkpoint(rising, "best").candidates == (2,)
    assert select_checkpoint(rising, "last").candidates == (5, 3, 2)
    assert select_checkpoint(rising, "3").candidates == (3,)
    assert chosen.describe(5) == "step 5 (last; best is 2)"
    assert chosen.describe(3) == "step 3 (best is 2, last is 5)"
    improving = make_run(tmp_path / "improving", {2: 1.5, 4: 1.25}, [2, 4, 5])
    assert select_checkpoint(improving).candidates == (5, 4, 2)
    assert select_checkpoint(improving, "best").candidates == (4, 2)
    for name, scores, expected in (("rose", {2: 1.5, 4: 2.0}, 2), ("fell", {2: 1.5, 4: 1.25}, 5)):
        earlier = make_run(tmp_path / name, scores, [2, 5], stores_trend=False)
        assert select_checkpoint(earlier).step == expected


def test_a_missing_choice_is_named(rising, tmp_path, caplog):
    with pytest.raises(UserError, match=r"no checkpoint of step 4; it has 2 \(best\), 3, 5 \(last\)"):
        select_checkpoint(rising, 4)
    for wrong in ("first", "-1", -1, True, "2.0"):
        with pytest.raises(UserError, match="should be best, last, or the number of a step"):
            select_checkpoint(rising, wrong)
    unknown = make_run(tmp_path / "unknown", {}, [1, 2])
    assert select_checkpoint(unknown).describe(2) == "step 2 (last)"
    assert select_checkpoint(unknown, "best").step == 2
    assert "was validated: the last one is used instead of the best" in caplog.text
    with pytest.raises(UserError, match="has no checkpoint"):
        select_checkpoint(Run(tmp_path / "none"))


def test_a_trend_is_the_minimum_so_far_and_survives_json():
    rng = random.Random(0)
    trend = Trend()
    scores = []
    for step in range(1, 40):
        score = rng.choice([math.nan, None, rng.randrange(5, 30) / 10])
        trend = trend.add(step, score, score)
        scores.append(math.inf if score is None or math.isnan(score) else score)
        trend = Trend.from_json(json.loads(json.dumps(trend.to_json(), allow_nan=False)))
        best = min(scores)
        assert trend.newest.step == step
        assert trend.best == (None if best == math.inf else Validation(scores.index(best) + 1, best, best))
        assert trend.since_best == step - (0 if best == math.inf else scores.index(best) + 1)
