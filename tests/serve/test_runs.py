"""The runs that the page shows, and a newer checkpoint for requests that begin."""

import asyncio
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("starlette")

from slm_jax.cli.serve import find_runs  # after the check for the extra
from slm_jax.generation.decode import encode_prompt
from slm_jax.run.directory import Run
from slm_jax.serve import batching, live
from slm_jax.serve.errors import ApiError
from slm_jax.serve.runs import RunList, read_curves, runs_in
from slm_jax.utils.errors import UserError
from tests.helpers import tiny_config
from tests.serve.conftest import loaded_run
from tests.serve.test_engine import alone, make_request, run


def make_run(path, steps=0, checkpoints=(), held_out=None, **options):
    path.mkdir(parents=True)
    Run(path).save_config(tiny_config(train__steps=100, **options))
    (path / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1, "loss": 1.0}) + "\n" for i in range(steps)))
    for step in checkpoints:
        (path / "checkpoints" / str(step)).mkdir(parents=True)
    if held_out is not None:
        (path / "corpus").mkdir()
        documents = np.array([(digest,) for digest in held_out], [("digest", "u8")])
        np.save(path / "corpus" / "validation-00000.documents.npy", documents)
    return Run(path)


def test_all_runs_of_a_folder_are_listed(tmp_path):
    served = make_run(tmp_path / "runs" / "a", 30, (10, 20), held_out=[1, 2])
    dpo = {"train__objective": "dpo", "data__mode": "padded", "data__source": "files", "data__files": ("pairs.jsonl",)}
    make_run(tmp_path / "runs" / "b", 0, held_out=[2, 1], **dpo)
    make_run(tmp_path / "runs" / "school" / "stages" / "01-prose", 5, held_out=[3])
    make_run(tmp_path / "elsewhere" / "c")
    (tmp_path / "runs" / "a" / "report.html").write_text("x")
    with served.metrics.open("a") as file:
        file.write('{"step": 31, "lo')
    runs = RunList(lambda: {"a": (served, 10)}, [tmp_path / "runs"])
    described = {each["id"]: each for each in runs.describe()}
    assert next(iter(described)) == "a"
    assert set(described) == {"a", "b", "school-01-prose"}
    expected = {"loaded": 10, "saved": 20, "step": 30, "steps": 100, "report": True}
    assert {name: described["a"][name] for name in expected} == expected
    assert (described["b"]["loaded"], described["b"]["saved"], described["b"]["step"]) == (None, None, 0)
    assert described["a"]["held_out"] == described["b"]["held_out"] != described["school-01-prose"]["held_out"]
    assert (described["a"]["objective"], described["b"]["objective"]) == ("next-token", "dpo")
    make_run(tmp_path / "runs" / "new", 1)  # while the server runs
    assert "new" in runs.runs()
    assert runs.version("../elsewhere/c") is None
    assert set(RunList(lambda: {"a": (served, 10)}).runs()) == {"a"}


def test_a_checkpoint_that_a_full_gate_refused_is_loaded_later(tmp_path, monkeypatch):
    engine = SimpleNamespace(name="a", run=SimpleNamespace(run=make_run(tmp_path / "a", 30, (10, 20)), step=10))
    models = SimpleNamespace(items=lambda: [("a", engine)], get={"a": engine}.get)
    view = live.LiveView(models, [])
    calls = []

    async def refuse_once(function, *args):
        calls.append((function, *args))
        if len(calls) == 1:
            raise ApiError(429, "busy")
        raise asyncio.CancelledError

    monkeypatch.setattr(live, "_FOLLOW_SECONDS", 0.0)
    monkeypatch.setattr(view, "_loading", SimpleNamespace(run=refuse_once))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(asyncio.wait_for(view.follow(), 10))
    assert calls == 2 * [(view._load_newest, engine)]


def test_points_of_two_runs_stand_for_as_many_steps(tmp_path):
    short, long = (make_run(tmp_path / str(steps), steps).metrics for steps in (100, 1000))
    assert read_curves(short)["width"] == 1
    curves = read_curves(long)
    assert curves["width"] == 8
    assert curves["loss"][0] == [4.5, 1.0]
    assert len(curves["loss"]) == 125
    assert read_curves(short, 8)["loss"] == [*curves["loss"][:12], [98.5, 1.0]]


def test_only_new_rows_are_read(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", 3)
    runs = RunList(lambda: {"a": (run, 1)})
    assert [step for step, _ in runs.curves("a")["loss"]] == [1, 2, 3]
    parsed = []
    monkeypatch.setattr(
        "slm_jax.serve.runs.json.loads", lambda line: parsed.append(line) or json.JSONDecoder().decode(line.decode())
    )
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "loss": 2.0}\nnonsense\n{"step": 5, "lo')
    assert runs.curves("a")["loss"][3:] == [[4, 2.0]]
    assert len(parsed) == 2
    assert runs.curves("a")["loss"][3:] == [[4, 2.0]]
    assert len(parsed) == 2
    resumed = tmp_path / "partial"  # training replaces the file when it resumes after step 2
    resumed.write_text(
        '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "loss": 7.0}\n'
        + 9 * '{"step": 4, "loss": 7.0}\n'
    )
    resumed.replace(run.metrics)
    assert runs.curves("a")["loss"][2] == [3, 7.0]


def test_folders_of_runs_can_be_served(tmp_path):
    make_run(tmp_path / "runs" / "a", 3, (3,))
    make_run(tmp_path / "runs" / "b", 3)
    folder = str(tmp_path / "runs")
    assert find_runs([folder]) == ([f"{folder}/a"], [tmp_path / "runs"])
    assert find_runs([f"{folder}/b"]) == ([f"{folder}/b"], [])
    assert find_runs(["none"]) == (["none"], [])  # load_run reports it
    assert {each.path.name for each in runs_in(tmp_path / "runs")} == {"a", "b"}
    (tmp_path / "runs" / "a" / "checkpoints" / "3").rmdir()
    with pytest.raises(UserError, match=r"no run in .*runs has a checkpoint"):
        find_runs([folder])


def test_damaged_and_unused_folders_do_not_hinder_a_folder_of_runs(tmp_path, caplog):
    folder = tmp_path / "runs"
    run = make_run(folder / "a", 3, (3,), held_out=(1, 2))
    documents = run.corpus / "validation-00000.documents.npy"
    documents.write_bytes(documents.read_bytes().replace(b"{", b"[", 1))
    damaged = make_run(folder / "b", 3, (3,))
    damaged.config.write_text("[train\n")
    os.utime(folder / "a" / "metrics.jsonl", (1, 1))
    (folder / "c").mkdir()
    (folder / "c" / ".unused").touch()
    assert find_runs([str(folder)]) == ([f"{folder}/a"], [folder])
    assert f"{folder}/b is skipped" in caplog.text
    assert [(each["id"], each["held_out"]) for each in RunList(dict, [folder]).describe()] == [("a", "")]


def test_requests_end_with_the_weights_that_they_began_with(engine, loaded, tokenizer, tmp_path):
    newer = loaded_run(tmp_path / "newer", tokenizer, seed=5)
    ids = encode_prompt(tokenizer, "The list")
    before, after = alone(loaded, ids), alone(newer, ids)
    assert before[:20] != after[:20]
    run(engine, [make_request(ids, 60, ignore_eos=True)])
    programs = batching.decode._cache_size()
    old = [make_request(ids, length, ignore_eos=True) for length in (60, 20, 60)]  # in two blocks of two slots
    engine.submit(old)
    while min(request.generated for request in old) < 3:
        engine._round()
    engine.replace_weights(newer)
    try:
        new = [make_request(ids, 20, ignore_eos=True) for _ in range(5)]
        engine.submit(new)
        while not all(request.on_chunk.finish_reason for request in [*old, *new]):
            engine._round()
        assert [request.on_chunk.ids for request in old] == [before[:60], before[:20], before[:60]]
        assert [request.on_chunk.ids for request in new] == [after[:20]] * 5
        assert engine.run is newer
        assert batching.decode._cache_size() == programs
        with pytest.raises(UserError, match="other shapes"):
            engine.replace_weights(loaded_run(tmp_path / "half", tokenizer, depth=2))
    finally:
        engine.replace_weights(loaded)
    assert run(engine, [make_request(ids, 20, ignore_eos=True)]) == [before[:20]]
