"""Test dynamic loss scaling: float16 against float32, overflows, growth, and runs that are interrupted."""

import functools
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_jax.distributed import sharding
from slm_jax.model import precision
from slm_jax.model.abstract import abstract_model
from slm_jax.model.ops import LossWeights
from slm_jax.report.run_data import read_report_data
from slm_jax.report.sections import notes
from slm_jax.run.metrics import progress_text
from slm_jax.training.objective import NextToken
from slm_jax.training.options import loss_scale
from slm_jax.training.schedule import is_schedule_state
from slm_jax.training.steps import make_steps
from slm_jax.training.train import train
from slm_jax.training.train_step import gradients
from slm_jax.utils.batch import IGNORE_INDEX
from slm_jax.utils.errors import UserError
from tests.helpers import random_ids, tiny_config
from tests.processes import command_environment, kill_at
from tests.runs import assert_same_run, read_rows, saved_arrays

VOCAB = 64
HUGE = 2.0**100  # no float16 gradient survives it, and float32 ones do


def batch(seed=0):
    ids = random_ids((8, 16), VOCAB, seed=seed)
    return {"input_ids": ids, "labels": jnp.concatenate([ids[:, 1:], jnp.full((8, 1), IGNORE_INDEX)], axis=1)}


def sequence(overflows, interval, monkeypatch):
    """Return the scale after each of a sequence of steps."""
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", interval)
    state = loss_scale.init()
    scales = []
    for overflow in overflows:
        state = loss_scale.update(state, jnp.asarray(overflow))
        scales.append(float(state.scale))
    return scales


def test_scale_follows_pytorch(monkeypatch):
    """PyTorch's GradScaler updates by the same rule, which it has as one operation."""
    torch = pytest.importorskip("torch")
    overflows = np.random.default_rng(0).random(200) < 0.15
    scale, tracker = torch.tensor(loss_scale.INITIAL_SCALE), torch.tensor(0, dtype=torch.int32)
    expected = []
    for overflow in overflows:
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(overflow)), 2.0, 0.5, 4)
        expected.append(float(scale))
    assert len(set(expected)) > 5
    assert sequence(overflows, 4, monkeypatch) == expected


def test_scale_stays_within_its_limits(monkeypatch):
    down = sequence([True] * 30, 4, monkeypatch)
    assert down[:2] == [64.0, 32.0]
    assert down[-1] == loss_scale.MIN_SCALE
    up = sequence([False] * 100, 4, monkeypatch)
    assert up[2:4] == [128.0, 256.0]
    assert up[-1] == loss_scale.MAX_SCALE


def test_gradients_do_not_depend_on_the_scale():
    """In float32, where nothing underflows, a power of two changes no digit; the sums are not scaled."""
    config = tiny_config(train__z_loss=0.01, train__ul_alpha=0.5)
    steps = make_steps(config, VOCAB)
    graph, _ = abstract_model(config, VOCAB)
    options = {"graph": graph, "objective": NextToken(LossWeights(0.01, 0.5)), "grad_accum_steps": 2}
    compute = jax.jit(lambda params, scale: gradients(params, batch(), None, **options, scale=scale))
    params = steps.init().params
    plain, scaled = (jax.tree.leaves(compute(params, jnp.float32(scale))) for scale in (1, 2**9))
    assert all(np.array_equal(x, y) for x, y in zip(plain, scaled, strict=True))


def padded(full):
    """Return a batch with rows of several lengths, one of them without any token."""
    mask = (jnp.arange(16) < jnp.array([16, 9, 3, 16, 0, 12, 16, 5])[:, None]).astype(jnp.int32)
    return full | {"labels": jnp.where(mask, full["labels"], IGNORE_INDEX), "attention_mask": mask}


FEATURES = {"train__accumulation": 2, "train__z_loss": 0.001, "train__ul_alpha": 0.2, "optimizer__name": "adamw"}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"train__residual_dtype": "compute"}, dict),  # activations in float16 as well, as on GPUs
        pytest.param({"train__residual_dtype": "compute", **FEATURES}, padded, marks=pytest.mark.slow),
        pytest.param({"model__attention": "naive", **FEATURES}, padded, marks=pytest.mark.slow),
    ],
)
def test_float16_learns_like_float32(fields, kind):
    """The losses of forty steps agree within two percent, the first ten within 0.2, and no step is skipped."""
    losses = {}
    for dtype in ("float32", "float16"):
        steps = make_steps(tiny_config(train__dtype=dtype, train__steps=40, **fields), VOCAB)
        state = steps.init()
        losses[dtype] = []
        for step in range(40):
            state, metrics = steps.train(state, kind(batch(step % 4)))
            losses[dtype].append(float(metrics["loss"]))
    assert losses["float16"] != losses["float32"]
    assert losses["float32"][-1] < 0.8 * losses["float32"][0]
    np.testing.assert_allclose(losses["float16"], losses["float32"], rtol=0.02)
    np.testing.assert_allclose(losses["float16"][:10], losses["float32"][:10], rtol=0.002)
    assert int(metrics["skipped"]) == 0
    assert float(metrics["loss_scale"]) == loss_scale.INITIAL_SCALE
    assert int(state.loss_scale.good_steps) == 40


@pytest.fixture(scope="module")
def half():
    """Return float16 steps that report the norms of layers."""
    return make_steps(tiny_config(train__dtype="float16", log__layers=1), VOCAB)


def scaled_by(state, scale):
    """Return a copy of a state with another loss scale; the step donates its arrays."""
    state = jax.tree.map(jnp.copy, state)
    return state._replace(loss_scale=state.loss_scale._replace(scale=jnp.float32(scale)))


def assert_skipped(before, after):
    """Assert that only the step, the schedule, the count of skips and the scale have changed."""

    def fixed(state):
        tree = (state.params, state.opt_state, state.health._replace(skipped=0))
        return jax.tree.leaves(
            jax.tree.map(lambda x: 0 if is_schedule_state(x) else x, tree, is_leaf=is_schedule_state)
        )

    assert all(np.array_equal(x, y) for x, y in zip(fixed(before), fixed(after), strict=True))
    counts = [
        [int(x.count) for x in jax.tree.leaves(state.opt_state, is_leaf=is_schedule_state) if is_schedule_state(x)]
        for state in (before, after)
    ]
    assert all(new == old + 1 for old, new in zip(*counts, strict=True))
    assert int(after.step) == int(before.step) + 1
    assert int(after.health.skipped) == int(before.health.skipped) + 1
    assert float(after.loss_scale.scale) == float(before.loss_scale.scale) / 2


def test_an_overflow_skips_the_step_and_halves_the_scale(half):
    state, healthy = half.train(half.init(), batch())
    before = jax.device_get(scaled_by(state, HUGE))
    after, metrics = half.train(scaled_by(state, HUGE), batch(1))
    assert_skipped(before, jax.device_get(after))
    assert np.isfinite(metrics["loss"])
    assert np.isinf(metrics["grad_norm"])  # never NaN, at which train.debug would stop
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(metrics))
    again, metrics = half.train(scaled_by(after, 64.0), batch(2))
    assert int(metrics["skipped"]) == 1
    assert int(again.loss_scale.good_steps) == 1
    assert np.isfinite(metrics["grad_norm"])
    assert float(metrics["grad_norm"]) < 10 * float(healthy["grad_norm"])  # of the unscaled gradient


def test_the_largest_scale_does_not_depend_on_the_batch():
    """Gradients of matrices, sums over all tokens, are float32: 128 times the rows overflow at the same scale."""
    config = tiny_config(train__dtype="float16", train__residual_dtype="compute", model__depth=1)
    graph, _ = abstract_model(config, VOCAB)
    params = make_steps(config, VOCAB).init().params
    options = {"graph": graph, "objective": NextToken()}
    compute = jax.jit(lambda batch, scale: optax.tree.norm(gradients(params, batch, None, **options, scale=scale)[0]))

    def largest(repeated):
        rows = jax.tree.map(lambda x: jnp.tile(x, (repeated, 1)), batch())
        scales = [2.0**n for n in range(6, 16)]
        return max(scale for scale in scales if jnp.isfinite(compute(rows, jnp.float32(scale))))

    assert largest(1) == largest(128) >= 2 * loss_scale.INITIAL_SCALE


def test_a_loss_that_is_not_finite_is_no_overflow(half):
    state = half.init()
    state.params["final_norm"]["scale"] = jnp.full_like(state.params["final_norm"]["scale"], jnp.nan)
    after, metrics = half.train(jax.tree.map(jnp.copy, state), batch())
    assert np.isnan(metrics["loss"])
    assert float(after.loss_scale.scale) == loss_scale.INITIAL_SCALE
    assert int(after.loss_scale.good_steps) == 0  # it does not bring the next growth closer
    assert int(metrics["skipped"]) == 0  # the default policy ends the run


def test_devices_agree_on_an_overflow():
    """All gradients come from one sequence: the devices that do not compute it skip the step as well."""
    sizes = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    config = tiny_config(train__dtype="float16", **sizes)
    mesh = sharding.make_mesh(config)
    steps = make_steps(config, VOCAB, mesh)
    labels = np.full((8, 16), IGNORE_INDEX, np.int32)
    labels[5] = random_ids((16,), VOCAB, seed=1)
    fed = sharding.shard_batch(mesh, {"input_ids": np.asarray(random_ids((8, 16), VOCAB)), "labels": labels})
    state, metrics = steps.train(steps.init(), fed)
    assert int(metrics["skipped"]) == 0
    state = state._replace(loss_scale=state.loss_scale._replace(scale=jax.device_put(HUGE, sharding.replicated(mesh))))
    before = jax.device_get(state)
    after, metrics = steps.train(state, fed)
    assert_skipped(before, jax.device_get(after))
    assert all(x.sharding.is_fully_replicated for x in after.loss_scale)
    assert np.isfinite(metrics["loss"])


TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * 7 % 13} lazy dogs.\n" for i in range(200))
RUN = {
    "model__depth": 1,
    "train__dtype": "float16",
    "train__batch_size": 4,
    "tokenizer__vocab_size": 300,
    "data__validation_fraction": 0.2,
    "eval__sample_tokens": 4,
    "optimizer__schedule": "constant",
    "eval__every": 8,
    "checkpoint__every": 4,
    "mesh__data": 1,
}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that trains a small float16 run on a small text."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(name, steps, **fields):
        return train(tiny_config(**RUN | {"train__steps": steps, "data__files": ("text.txt",), **fields}), name)

    monkeypatch.chdir(tmp_path)
    return run


def use_a_growing_scale(monkeypatch):
    """Let the scale grow every third step, beyond what float16 holds."""
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**17)
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)


def test_a_resumed_run_continues_with_the_scale(start, tmp_path, monkeypatch):
    """Two calls end with the same bits as one, in which train.debug accepts the overflows."""
    use_a_growing_scale(monkeypatch)
    start("whole", 16, train__debug=True)
    start("parts", 8, train__debug=True)
    result = start("parts", 16, train__debug=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    rows = read_rows(tmp_path / "whole")
    overflows = [row["grad_norm"] is None for row in rows]
    assert [row["skipped"] for row in rows] == np.cumsum(overflows).tolist()
    assert all(np.isfinite(row["loss"]) for row in rows)
    scales = [row["loss_scale"] for row in rows]
    assert scales[:3] == [2.0**17, 2.0**16, 2.0**15]
    changes = [new / old for old, new in itertools.pairwise(scales)]
    assert set(changes) == {0.5, 1.0, 2.0}
    assert [change == 0.5 for change in changes] == overflows[:-1]
    assert f"{sum(overflows)} skipped" in progress_text(result.metrics)
    (note, *_) = [note for note in notes(read_report_data(tmp_path / "parts")) if "skipped" in note]
    assert note.startswith(f"{sum(overflows)} batches were skipped")
    assert f"overflows of float16 among them; the loss scale is {scales[-1]:g})" in note


@pytest.mark.slow
def test_a_killed_run_ends_bit_identical(start, tmp_path, monkeypatch):
    """SIGKILL while the scale changes every few steps."""
    use_a_growing_scale(monkeypatch)
    start("whole", 60)
    code = (
        "from slm_jax.training import train; from slm_jax.training.options import loss_scale\n"
        "from tests.helpers import tiny_config\n"
        "from tests.training.test_loss_scale import RUN\n"
        "loss_scale.INITIAL_SCALE, loss_scale.GROWTH_INTERVAL = 2.0**17, 3\n"
        "train.train(tiny_config(**RUN | {'train__steps': 60, 'data__files': ('text.txt',)}), 'killed')\n"
    )
    environment = command_environment(tmp_path / "cache") | {"PYTHONPATH": str(Path(__file__).parents[2])}
    rows = tmp_path / "killed" / "metrics.jsonl"

    def has_rows(count):
        return rows.exists() and rows.read_text().count("\n") >= count

    instants = [functools.partial(has_rows, count) for count in (6, 22, 41)]
    kill_at([sys.executable, "-c", code], instants, environment)
    start("killed", 60)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert read_rows(tmp_path / "killed")[-1]["skipped"] > 5


def test_an_overflow_at_the_lowest_scale_ends_the_run(start, tmp_path, monkeypatch):
    for name in ("INITIAL_SCALE", "MIN_SCALE"):
        monkeypatch.setattr(loss_scale, name, HUGE)
    with pytest.raises(
        UserError,
        match=r"the gradient of step 1 overflows float16 even at the lowest.*optimizer\.lr.*--train\.dtype float32",
    ):
        start("run", 8)
    assert not read_rows(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_auto_may_mean_another_precision_after_a_move(start, tmp_path, monkeypatch):
    """A run that began without loss scaling, as those of earlier versions, gets a scale, and loses it again."""

    def move_to(has_float16_only):
        monkeypatch.setattr(precision, "_prefers_bfloat16", lambda platform: False)
        monkeypatch.setattr(precision, "_has_only_float16_units", lambda platform: has_float16_only)

    for index, is_half in enumerate((False, True, False)):
        move_to(is_half)
        start("run", 2 * index + 2, train__dtype="auto")
        _, arrays = saved_arrays(tmp_path / "run" / "checkpoints")
        assert any("loss_scale" in name for name in arrays) == is_half
    assert ["loss_scale" in row for row in read_rows(tmp_path / "run")] == [False, False, True, True, False, False]
