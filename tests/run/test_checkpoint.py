"""Checkpoints are atomic, verified byte by byte, kept by policy, and failures are reported."""

import errno
import json
import math
import random
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from slm_jax.config.schema import CheckpointConfig
from slm_jax.run import checksums
from slm_jax.run.checkpoint import Checkpoints, steps_in
from slm_jax.run.read_checkpoint import read_params
from slm_jax.run.restore import restore_newest
from slm_jax.run.selection import regular_steps
from slm_jax.utils.errors import UserError


def make_state(value=1.0):
    weights = jax.random.normal(jax.random.key(0), (64, 32)) * value
    return {"step": jnp.asarray(3), "params": {"w": weights, "b": jnp.full((900,), value)}, "key": jax.random.key(1)}


def raw(state):
    return [np.asarray(jax.random.key_data(x) if "key" in str(x.dtype) else x) for x in jax.tree.leaves(state)]


def assert_same(first, second):
    assert all(np.array_equal(a, b) for a, b in zip(raw(first), raw(second), strict=True))


def restore(folder, state=None):
    shapes = jax.eval_shape(lambda: make_state() if state is None else state)
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        return restore_newest(checkpoints, lambda _: shapes)


def save(folder, *steps, value=1.0, **policy):
    with Checkpoints(folder, CheckpointConfig(**policy)) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(value * step), {"text": "abc"}, None)


def test_a_restored_state_equals_the_saved_one(tmp_path):
    assert restore(tmp_path / "a") is None
    save(tmp_path / "a", 1, 2, 3)
    state, position = restore(tmp_path / "a")
    assert_same(state, make_state(3))
    assert position == {"text": "abc", "step": 3, "score": None}
    assert steps_in(epath.Path(tmp_path / "a")) == [2, 3]
    assert (tmp_path / "a" / "3").is_dir()  # under its plain name: others look for it


def test_a_flipped_bit_in_any_file_is_detected_and_the_previous_checkpoint_used(tmp_path, caplog):
    """Orbax reads most flipped bytes of an array without an error (version 0.12.8)."""
    save(tmp_path / "a", 1, 2)
    rng = random.Random(0)
    files = [p for p in (tmp_path / "a" / "2").rglob("*") if p.is_file()]
    wanted = ("state", "position", "checksums.json")
    files = [p for p in files if str(p.relative_to(tmp_path / "a" / "2")).startswith(wanted)]
    files = [p for p in files if p.name != "commit_success.txt"]
    assert len(files) > 8
    for file in files:
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        copy = tmp_path / "b" / file.relative_to(tmp_path / "a")
        data = bytearray(copy.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        copy.write_bytes(bytes(data))
        caplog.clear()
        state, position = restore(tmp_path / "b")
        assert position["step"] == 1, file
        assert_same(state, make_state(1))
        assert len(caplog.messages) == 1
        assert "checkpoint 2 is corrupt and skipped" in caplog.messages[0]
        assert steps_in(epath.Path(tmp_path / "b")) == [1]
        assert (tmp_path / "b" / "damaged" / "2").is_dir()
        shutil.rmtree(tmp_path / "b")


def test_a_missing_file_is_detected_and_without_a_valid_checkpoint_it_is_an_error(tmp_path, caplog):
    save(tmp_path / "a", 1)
    max((tmp_path / "a" / "1").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size).unlink()
    with pytest.raises(UserError, match=r"of steps \[1\], see above"):
        restore(tmp_path / "a")
    assert "is missing" in caplog.messages[0]
    with pytest.raises(UserError, match="no usable checkpoint"):
        read_params(tmp_path / "a", jax.eval_shape(make_state)["params"])


def test_a_mismatched_shape_is_not_corruption(tmp_path):
    save(tmp_path / "a", 1)
    other = make_state() | {"params": {"w": jnp.zeros((2, 2)), "other": jnp.zeros(3)}}
    with pytest.raises(UserError, match="is complete, but its arrays do not match this config"):
        restore(tmp_path / "a", state=other)
    assert steps_in(epath.Path(tmp_path / "a")) == [1]


def expected_to_stay(scores, keep, keep_best, keep_every):
    """Apply the policies naively to {step: score} of all checkpoints that were ever saved."""
    stay = {}
    for step, score in scores.items():
        stay[step] = score
        best = sorted((s for s in stay if stay[s] is not None), key=lambda s: (stay[s], s))[:keep_best]
        newest = sorted(stay)[-keep:]
        stay = {s: v for s, v in stay.items() if s in best or s in newest or (keep_every and s % keep_every == 0)}
    return sorted(stay)


def test_newest_best_and_periodic_checkpoints_are_kept(tmp_path):
    rng = random.Random(1)
    for trial, (keep, best, every) in enumerate([(1, 0, 0), (2, 2, 0), (1, 1, 3)]):
        policy = {"keep": keep, "keep_best": best, "keep_every": every}
        folder = tmp_path / str(trial)
        scores = {step: rng.choice([None, rng.random()]) for step in range(1, 9)}
        for steps in (range(1, 5), range(5, 9)):  # in two calls: the scores of the first call are read again
            with Checkpoints(folder, CheckpointConfig(**policy)) as checkpoints:
                for step in steps:
                    checkpoints.save(step, {"x": jnp.full((3,), step)}, {}, scores[step])
        assert steps_in(epath.Path(folder)) == expected_to_stay(scores, **policy), policy


def test_a_corrupt_checkpoint_is_not_kept_as_the_best(tmp_path, caplog):
    scores = {1: 0.1, 2: 0.2, 3: 0.5, 4: 0.6, 5: 0.7}
    policy = CheckpointConfig(keep=1, keep_best=1)

    def continue_with(*steps):
        with Checkpoints(tmp_path / "a", policy) as checkpoints:
            for step in steps:
                checkpoints.save(step, {"x": jnp.full((300,), step)}, {}, scores[step])
        return steps_in(epath.Path(tmp_path / "a"))

    assert continue_with(1, 2) == [1, 2]
    array = max((tmp_path / "a" / "1" / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    damaged = bytearray(array.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    array.write_bytes(damaged)
    assert continue_with(3) == [2, 3]
    assert "the checkpoint of step 1 is corrupt (" in caplog.text
    assert caplog.text.count("not kept as the best one") == 1
    assert continue_with(4, 5) == [2, 5]


def test_an_average_leaves_out_an_older_checkpoint_that_is_kept_as_the_best():
    newest_first = [900, 800, 600, 350, 300, 0]
    assert regular_steps(newest_first, CheckpointConfig(keep=2)) == [900, 800]
    assert regular_steps(newest_first, CheckpointConfig(keep=3, keep_every=300)) == [900, 800, 600, 300]


def test_when_a_checkpoint_is_due(tmp_path):
    def due(step, score=None, **policy):
        with Checkpoints(tmp_path / "a", CheckpointConfig(every=10, **policy)) as checkpoints:
            checkpoints._scores = {1: 0.5, 2: 0.7}  # those that are on disk
            return checkpoints.due(step, score)

    assert due(20)
    assert not due(21)
    assert due(21, keep_every=7)
    assert not due(21, score=0.1, keep_best=0)
    assert due(21, score=0.1)
    assert due(21, score=0.6, keep_best=2)
    assert not due(21, score=0.6, keep_best=1)
    assert not due(21, score=math.nan, keep_best=3)
    assert not due(21, minutes=60)
    with Checkpoints(tmp_path / "a", CheckpointConfig(every=10, minutes=1e-4)) as checkpoints:
        end = time.monotonic() + 60e-4
        while time.monotonic() < end:
            pass
        assert checkpoints.due(21)
        checkpoints.save(21, {"x": jnp.zeros(3)}, {})
        assert not checkpoints.due(22) or time.monotonic() > end + 60e-4


def test_a_failed_save_is_reported_at_the_next_step(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(UserError, match="could not be written to") as caught:  # noqa: SIM117, PT012
        with Checkpoints(tmp_path / "a", CheckpointConfig(every=10)) as checkpoints:
            checkpoints.save(1, make_state(), {})
            checkpoints.wait()
            monkeypatch.setattr(checksums, "write", fail)  # in Orbax's thread, after the arrays
            checkpoints.save(2, make_state(), {})
            checkpoints._finishing.join()  # meanwhile: more steps
            checkpoints.due(3)
    assert "continues from the last complete checkpoint" in str(caught.value)
    assert steps_in(epath.Path(tmp_path / "a")) == [1]


def test_a_missing_folder_is_reported_at_once(tmp_path):
    """Threads of Orbax would wait ten minutes for it, and the end of the process for them."""
    with pytest.raises(UserError, match="could not be written to"):  # noqa: SIM117, PT012
        with Checkpoints(tmp_path / "a", CheckpointConfig(every=10)) as checkpoints:
            shutil.rmtree(tmp_path / "a")
            (tmp_path / "a").write_text("a file where the folder was")
            before = threading.enumerate()
            checkpoints.save(2, make_state(), {})
    assert not [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]


def test_leftovers_of_a_kill_are_removed(tmp_path):
    save(tmp_path / "a", 1, 2)
    shutil.copytree(tmp_path / "a" / "1", tmp_path / "a" / ".deleted-1")
    shutil.copytree(tmp_path / "a" / "1", tmp_path / "a" / "3.orbax-checkpoint-tmp")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert restore(tmp_path / "a")[1]["step"] == 2
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["1", "2", "notes.txt"]


def test_read_params_averages_the_newest(tmp_path):
    save(tmp_path / "a", 1, 2, 3, keep=3)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(make_state)["params"]
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    newest, step = read_params(tmp_path / "a", target)
    assert step == 3
    assert_same(newest, make_state(3)["params"])
    mean, step = read_params(tmp_path / "a", target, average=2)
    assert step == 3
    expected = (np.float64(make_state(2)["params"]["w"]) + np.float64(make_state(3)["params"]["w"])) / 2
    assert np.array_equal(mean["w"], expected.astype(np.float32))
    assert mean["w"].sharding == device
    with pytest.raises(UserError, match=r"holds 3 complete checkpoints, of steps \[3, 2, 1\], not 4 to average"):
        read_params(tmp_path / "a", target, average=4)


def test_a_checkpoint_that_has_lost_its_checksums_is_damaged(tmp_path, caplog):
    save(tmp_path / "a", 1, 2)
    (tmp_path / "a" / "2" / "checksums.json").unlink()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(make_state)["params"]
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    assert read_params(tmp_path / "a", target)[1] == 1
    state, position = restore(tmp_path / "a")
    assert position["step"] == 1
    assert_same(state, make_state(1))
    assert all("checkpoint 2 is corrupt" in line and "checksums.json is missing" in line for line in caplog.messages)
    assert (tmp_path / "a" / "damaged" / "2").is_dir()


def test_a_checkpoint_of_the_first_version_is_read(tmp_path):
    """Orbax's CheckpointManager writes one, as the first version of this project did."""
    with ocp.CheckpointManager(tmp_path / "a") as manager:
        position = ocp.args.JsonSave({"step": 7, "seed": 0})
        manager.save(7, args=ocp.args.Composite(state=ocp.args.StandardSave(make_state()), position=position))
        manager.wait_until_finished()
    assert not (tmp_path / "a" / "7" / "checksums.json").exists()
    state, position = restore(tmp_path / "a")
    assert_same(state, make_state())
    assert position == {"step": 7, "seed": 0}


def test_every_file_has_a_checksum(tmp_path):
    save(tmp_path / "a", 1)
    checkpoint = tmp_path / "a" / "1"
    table = json.loads((checkpoint / "checksums.json").read_text())
    files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert {name for name in files - table.keys() if "commit_success" not in name} == {
        "checksums.json",
        "_CHECKPOINT_METADATA",
    }
