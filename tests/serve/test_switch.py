"""Another run of the folder takes the place of a served model, while requests are in progress."""

import asyncio
import json
import re
import threading
import urllib.request

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from slm_jax.serve import live
from slm_jax.serve.completions import Limits
from slm_jax.serve.engine import Engine
from slm_jax.serve.errors import ApiError
from slm_jax.serve.models import Models
from slm_jax.utils.errors import UserError
from tests.serve.conftest import loaded_run, serve
from tests.serve.test_api import send

LONG = {"prompt": "The list", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": "The list", "max_tokens": 5, "temperature": 0}


@pytest.fixture
def switched(tmp_path, tokenizer, monkeypatch):
    """A server of the run `first`; `second` and `broken` are in its folder."""
    runs = {}
    for number, name in enumerate(("first", "second", "broken")):
        runs[name] = loaded_run(tmp_path / name, tokenizer, seed=number)
        tokenizer.save(runs[name].run.tokenizer)

    def load(path, step=None):
        name = path.rpartition("/")[2]
        if name == "broken":
            raise UserError("checkpoint 300 is corrupt")
        return runs[name]

    monkeypatch.setattr(live, "load_run", load)
    engines = {"first": Engine(runs["first"], slots=2, queue_size=2, block_slots=2)}
    with serve(engines, Limits(300, 100_000, 60), folders=[tmp_path]) as served:
        yield served


def completion(served, **body):
    status, _, tree = send(served, "POST", "/v1/completions", body)
    return status, tree.get("model") or tree["error"]["message"], tree["choices"][0]["text"] if status == 200 else ""


def names_in(served):
    """Return the names of the models by each endpoint that has them."""
    metrics = send(served, "GET", "/metrics")[2]
    document = send(served, "GET", "/openapi.json")[2]
    models = document["components"]["schemas"]["CompletionRequest"]["properties"]["model"]["anyOf"][0]["enum"]
    return {
        "models": [model["id"] for model in send(served, "GET", "/v1/models")[2]["data"]],
        "vocabularies": send(served, "GET", "/api/vocabularies")[2][:1],
        "runs": [run["id"] for run in send(served, "GET", "/api/runs")[2]["runs"] if run["loaded"] is not None],
        "openapi": models,
        "metrics": [name for name in ("first", "second") if f'slm_slots{{model="{name}"}}' in metrics],
    }


def test_requests_in_progress_end_with_the_model_that_they_began_with(switched):
    expected = completion(switched, **LONG)
    assert expected[:2] == (200, "first")
    request = urllib.request.Request(
        f"{switched.url}/v1/completions",
        json.dumps({**LONG, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as stream:
        lines = [stream.readline()]
        status, _, tree = send(switched, "POST", "/api/load", {"run": "second", "replace": "first"})
        assert (status, tree) == (200, {"id": "second", "step": 300})
        status, model, text = completion(switched, **SHORT)  # the first is still writing
        assert (status, model) == (200, "second")
        lines += stream.read().split(b"\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert {event["model"] for event in events} == {"first"}
    assert "".join(event["choices"][0]["text"] for event in events) == expected[2]
    assert not expected[2].startswith(text)  # the weights are others
    assert names_in(switched) == {key: ["second"] for key in names_in(switched)}
    assert send(switched, "GET", "/health")[0] == 200
    assert send(switched, "GET", "/v1/models/first")[0] == 404
    assert completion(switched, **SHORT, model="first")[:2] == (
        404,
        "there is no model 'first': GET /v1/models lists them",
    )
    threads = [thread.name for thread in threading.enumerate()]
    assert "engine second" in threads
    assert send(switched, "POST", "/api/load", {"run": "first", "replace": "second"})[0] == 200
    assert completion(switched, **LONG) == expected
    assert names_in(switched) == {key: ["first"] for key in names_in(switched)}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"run": "second", "replace": "none"}, 404, "there is no model 'none'"),
        ({"run": "none", "replace": "first"}, 404, "there is no run 'none': GET /api/runs lists them"),
        ({"run": "../first/../second", "replace": "first"}, 404, "there is no run"),
        ({"run": "second"}, 404, "there is no model 'second'"),
        ({"run": "first", "replace": "first"}, 409, "run 'first' is served already"),
        ({"run": "broken", "replace": "first"}, 409, "checkpoint 300 is corrupt"),
        ({"run": "second", "replace": 3}, 400, "replace"),
    ],
)
def test_a_run_that_cannot_be_served_leaves_the_old_one(switched, body, status, words):
    answer = send(switched, "POST", "/api/load", body)
    assert answer[0] == status
    assert words in answer[2]["error"]["message"]
    assert completion(switched, **SHORT)[:2] == (200, "first")


def test_a_run_that_is_too_large_leaves_the_old_one(switched, monkeypatch):
    body = {"run": "second", "replace": "first"}
    with switched.engines["first"].prefixes.optional("a test"):
        raise MemoryError  # pauses the cache of the old engine; that of the new one has its full size
    monkeypatch.setattr(live, "free_host_memory", lambda: 1000)
    status, _, tree = send(switched, "POST", "/api/load", body)
    assert status == 409
    message = tree["error"]["message"]
    assert re.search(r"/second needs 51\d MB of memory beside the model that is served, 0 MB are free: stop", message)
    monkeypatch.undo()

    def exhausted(self, run, name):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocating")

    monkeypatch.setattr(Engine, "for_run", exhausted)
    monkeypatch.setattr(live, "load_run", lambda path, step: None)
    status, _, tree = send(switched, "POST", "/api/load", body)
    assert status == 409
    assert tree["error"]["message"].endswith("second cannot be served: RESOURCE_EXHAUSTED: out of memory allocating")
    assert completion(switched, **SHORT)[:2] == (200, "first")


def test_two_requests_at_once_do_not_serve_a_run_twice(tmp_path, tokenizer, monkeypatch):
    """Both find the run unserved before either has loaded it."""
    runs = {name: loaded_run(tmp_path / name, tokenizer) for name in ("first", "second", "third")}
    for run in runs.values():
        tokenizer.save(run.run.tokenizer)
    monkeypatch.setattr(live, "load_run", lambda path, step=None: runs[path.rpartition("/")[2]])

    async def load_twice():
        engines = Models({name: Engine(runs[name], slots=1, block_slots=1) for name in ("first", "third")})
        for engine in engines.values():
            engine.start()
        view = live.LiveView(engines, [tmp_path])
        loads = [view.load("second", name) for name in ("first", "third")]
        try:
            return await asyncio.gather(*loads, return_exceptions=True), list(engines)
        finally:
            await engines.close()

    (done, refused), names = asyncio.run(load_twice())
    assert done.status_code == 200
    assert isinstance(refused, ApiError)
    assert refused.status == 409
    assert "run 'second' is served already" in str(refused)
    assert names == ["second", "third"]
    assert not [thread.name for thread in threading.enumerate() if thread.name == "engine second"]
