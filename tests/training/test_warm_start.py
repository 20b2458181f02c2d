"""Warm start: the weights are copied bit for bit, once, and the source is not needed afterwards."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.cli.options import config_from_args
from slm_jax.config.schema import Config, ModelConfig
from slm_jax.config.weight_conflicts import CHANGE_FUNCTION, changed_function, weight_conflicts
from slm_jax.run.directory import Run
from slm_jax.run.read_checkpoint import read_fields
from slm_jax.training.recorder import StepRecorder
from slm_jax.training.steps import make_steps
from slm_jax.training.train import train
from slm_jax.training.warm_start import find_initial_weights
from slm_jax.utils.errors import UserError
from tests.helpers import TINY, tiny_model

SMALL = {**TINY, "model.depth": 1, "train.batch_size": 8, "tokenizer.vocab_size": 320, "eval.sample_tokens": 0}
SMALL |= {"eval.max_tokens": 200, "train.steps": 6, "checkpoint.every": 100, "mesh.data": 1}


LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_length": 16}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return a folder with two texts and a run trained on the first."""
    path = tmp_path_factory.mktemp("warm")
    for name, animal in (("a", "fox"), ("b", "owl")):
        lines = (f"Line {i} of {name}: the {animal} sees {i * 7 % 13} dogs.\n" for i in range(400))
        (path / f"{name}.txt").write_text("".join(lines))
    train(small(path, "a"), path / "first")
    return path


def small(path, text, **overrides):
    given = {"data.files": str(path / f"{text}.txt"), "data.cache": str(path / "cache")}
    return Config.load(**{**SMALL, **given, **{k.replace("__", "."): v for k, v in overrides.items()}})


def tuned(path, **overrides):
    """Return a config that starts with the weights of the run `first`."""
    return small(path, "b", **{"init__from_run": str(path / "first"), "train__seed": 1, **overrides})


def saved(run):
    """Return the step and the arrays of the newest checkpoint by name, without the random key."""
    config = Run(run).read_config()
    vocab = Run(run).newest_step() is not None and 320
    shapes = jax.eval_shape(make_steps(config, vocab).init)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    item = {name: getattr(shapes, name) for name in ("params", "opt_state", "step")}
    item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), item)
    state, step = read_fields(Run(run).checkpoints, item)
    return step, {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}


class StoppedError(Exception):
    pass


def stop_at(monkeypatch, wanted):
    """Interrupt training at a step, with nothing saved but the initial state."""
    real = StepRecorder.record

    def record(self, step, *args):
        if step == wanted:
            raise StoppedError
        return real(self, step, *args)

    monkeypatch.setattr(StepRecorder, "record", record)


@pytest.mark.parametrize("optimizer", ["fresh", "carry"])
def test_weights_are_copied_exactly_and_the_source_is_not_needed_again(workspace, tmp_path, monkeypatch, optimizer):
    shutil.copytree(workspace / "first", workspace / "source", dirs_exist_ok=True)
    changes = {
        "init__from_run": str(workspace / "source"),
        "model__dropout": 0.1,
        "model__window": 4,
        "optimizer__clip": 0.0,
    }
    config = tuned(workspace, init__optimizer=optimizer, train__sequence_length=8, **changes)
    train(config, tmp_path / "whole")

    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StoppedError):
            train(config, tmp_path / "broken")
    step, first = saved(tmp_path / "broken")
    assert step == 0
    _, source = saved(workspace / "source")
    for name, value in first.items():
        moment = "opt_state" in name and ("mu" in name or "nu" in name or "muon" in name) and "count" not in name
        if "params" in name:
            assert np.array_equal(value, source[name]), name
        elif moment:
            # Without clipping the chain is one shorter.
            theirs = source[name.replace("['opt_state']", "['opt_state'][1]", 1)]
            assert np.array_equal(value, theirs if optimizer == "carry" else np.zeros_like(theirs)), name
            assert theirs.any()
    counts = {name: int(value) for name, value in first.items() if name.endswith(".count")}
    adam = [value for name, value in counts.items() if "[0].count" in name]
    schedule = [value for name, value in counts.items() if "[2].count" in name]
    assert set(schedule) == {0}
    assert set(adam) == {6 if optimizer == "carry" else 0}
    assert len(adam) + len(schedule) == len(counts)

    shutil.rmtree(workspace / "source")
    train(config, tmp_path / "broken")
    (one_step, one), (two_step, two) = saved(tmp_path / "whole"), saved(tmp_path / "broken")
    assert one_step == two_step == 6
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_conflicts_are_refused_with_both_values(workspace, tmp_path):
    conflicts = {
        ("model__dim", 64): "model.dim: 32 saved, 64 current",
        ("model__tie_weights", False): "model.tie_weights: True saved, False current",
        ("tokenizer__vocab_size", 400): "tokenizer.vocab_size: 320 saved, 400 current",
        ("tokenizer__path", "english-8k"): "whose weights fit no other: leave it out",
        ("init__from_run", str(workspace / "nowhere")): "no run in",
    }
    for (name, value), expected in conflicts.items():
        with pytest.raises(UserError) as caught:
            train(tuned(workspace, **{name: value}), tmp_path / "run")
        assert expected in str(caught.value)
    other = tuned(workspace, init__optimizer="carry", optimizer__name="adamw", model__heads=2)
    with pytest.raises(UserError) as caught:
        train(other, tmp_path / "run")
    assert "model.heads: 4 saved, 2 current" in str(caught.value)
    assert "optimizer.name: 'muon' saved, 'adamw' current" in str(caught.value)
    scheduled = tuned(workspace, init__optimizer="keep", optimizer__momentum_warmup_steps=9)
    with pytest.raises(UserError, match="moments can be kept if both or neither have a schedule of the momentum"):
        train(scheduled, tmp_path / "scheduled")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no run whose optimizer state could be kept"):
        Config.load(init__optimizer="carry")


def test_the_model_options_default_to_those_of_the_source(workspace, tmp_path):
    args = ["--init.from_run", str(workspace / "first"), "--model.dropout", "0.2"]
    config = config_from_args(args, "x", "x")
    assert (config.model.dim, config.model.dropout) == (32, 0.2)
    assert config_from_args(["--config", "minute", *args], "x", "x").model.dim == 128


CHANGES = {
    "model.window": {"window": 4},
    "model.full_layers": {"window": 4, "full_layers": (0,)},
    "model.window_pattern": {"window": 4, "window_pattern": "L"},
    "model.logit_softcap": {"logit_softcap": 5.0},
    "model.norm_eps": {"norm_eps": 0.1},
    "model.rope_base": {"rope_base": 100.0},
    "model.rope_scaling": {"rope_scaling": "linear", "rope_factor": 2.0},
    "model.rope_factor": {"rope_scaling": "linear", "rope_factor": 3.0},
    "model.rope_original_length": {**LLAMA3, "rope_original_length": 128},
    "model.rope_low_turns": {**LLAMA3, "rope_low_turns": 2.0},
    "model.rope_high_turns": {**LLAMA3, "rope_high_turns": 9.0},
    "model.rope_attention_factor": {**LLAMA3, "rope_scaling": "yarn", "rope_attention_factor": 1.5},
    "model.nope_layers": {"nope_layers": (0,)},
}
BEFORE = {  # the other value, where it is not the default
    "model.full_layers": {"window": 4},
    "model.window_pattern": {"window": 4},
    "model.rope_factor": {"rope_scaling": "linear", "rope_factor": 2.0},
    "model.rope_original_length": LLAMA3,
    "model.rope_low_turns": LLAMA3,
    "model.rope_high_turns": LLAMA3,
    "model.rope_attention_factor": {**LLAMA3, "rope_scaling": "yarn"},
}


def test_a_start_with_another_function_of_the_weights_is_reported(workspace, tmp_path, caplog):
    changed = {
        "model__logit_softcap": 5.0,
        "model__norm_eps": 0.1,
        "model__rope_base": 500.0,
        "model__nope_layers": (0,),
    }
    find_initial_weights(tuned(workspace, **changed))
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    text = record.getMessage()
    assert "model.logit_softcap 0 before, 5 now; model.norm_eps 1e-06 before, 0.1 now; model.rope_base 10000 " in text
    assert "model.nope_layers () before, (0,) now" in text
    assert str(workspace / "first") in text
    caplog.clear()
    find_initial_weights(tuned(workspace, model__dropout=0.1, model__max_positions=64, train__sequence_length=8))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_table_holds_every_option_that_changes_the_function():
    assert set(CHANGE_FUNCTION) == CHANGES.keys()
    for name, fields in CHANGES.items():
        text = changed_function(ModelConfig(**fields), ModelConfig(**BEFORE.get(name, {})))
        assert name in text
    full = ModelConfig(window=8, full_layers=(1,), depth=2)
    assert changed_function(full, ModelConfig(window=8, window_pattern="SL", depth=2)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_the_options_of_the_table_change_the_logits(name):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 64)))
    before = tiny_model(**BEFORE.get(name, {}))(ids)
    after = tiny_model(**CHANGES[name])(ids)
    assert float(jnp.abs(before - after).max()) > 1e-4


def test_options_without_effect_do_not_conflict(workspace):
    relu2 = {"model__mlp": "relu2"}
    one, two = (small(workspace, "a", **relu2, model__mlp_multiple=multiple) for multiple in (64, 32))
    assert list(weight_conflicts(one, two)) == []
    other = small(workspace, "a", **relu2, model__head_dim=one.model.head_width)
    assert list(weight_conflicts(one, other)) == []
