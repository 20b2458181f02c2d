"""The HTTP API over a real socket, through OpenAI's client and plain requests."""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from slm_jax.generation.decode import encode_prompt
from slm_jax.generation.sampling import Sampling
from slm_jax.serve.completions import Completion
from slm_jax.serve.engine import Engine
from slm_jax.serve.requests import Progress
from tests.serve.conftest import KEY
from tests.serve.test_engine import alone, make_request, run

PROMPT = "The list is"


def send(served, method, path, body=None, headers=(), raw=None):
    """Send a plain request; returns status, headers and body."""
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=60)
    data = raw if raw is not None else None if body is None else json.dumps(body)
    kind = {} if data is None else {"Content-Type": "application/json"}
    connection.request(method, path, data, {**kind, **dict(headers)})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = (response.getheader("content-type") or "").startswith("application/json")
    return response.status, response.headers, json.loads(content) if is_json else content.decode()


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.005)


def test_completion_equals_the_text_of_generate(client, loaded):
    completion = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
    )
    ids = encode_prompt(loaded.tokenizer, PROMPT)
    assert completion.choices[0].text == loaded.tokenizer.decode(alone(loaded, ids)[:20])
    assert completion.choices[0].finish_reason == "length"
    assert (completion.model, completion.object) == ("tiny", "text_completion")
    assert completion.usage.prompt_tokens == len(ids)
    assert (completion.usage.completion_tokens, completion.usage.total_tokens) == (20, 20 + len(ids))
    from_ids = client.completions.create(
        model="tiny", prompt=ids, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
    )
    assert from_ids.choices[0].text == completion.choices[0].text
    other = client.completions.create(model="other", prompt=PROMPT, max_tokens=20, temperature=0)
    assert other.choices[0].text != completion.choices[0].text


def test_streamed_choices_equal_the_complete_response(client):
    arguments = {
        "model": "tiny",
        "prompt": [PROMPT, "It"],
        "n": 2,
        "max_tokens": 30,
        "seed": 7,
        "top_p": 0.9,
        "logprobs": 2,
    }
    complete = client.completions.create(**arguments)
    texts = [""] * 4
    tokens = [[] for _ in range(4)]
    ends = [None] * 4
    usage = None
    for part in client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
        usage = part.usage or usage
        for choice in part.choices:
            assert ends[choice.index] is None
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in complete.choices]
    assert tokens == [choice.logprobs.tokens for choice in complete.choices]
    assert ends == [choice.finish_reason for choice in complete.choices]
    assert usage == complete.usage
    assert len(set(texts)) == 4
    again = client.completions.create(**{**arguments, "prompt": "It", "n": 1, "seed": 8})
    assert again.choices[0].text == texts[3]  # the second sample has the seed + 1, alone or batched


def test_echo_with_logprobs_scores_the_prompt(client, engine, loaded):
    scored = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=3)
    choice = scored.choices[0]
    ids = loaded.tokenizer.encode(PROMPT)
    names = [loaded.tokenizer.id2token[id_] for id_ in ids]
    assert (choice.text, choice.logprobs.tokens) == (PROMPT, names)
    assert choice.logprobs.text_offset == [start for start, _ in loaded.tokenizer.offsets(PROMPT)]
    request = make_request(encode_prompt(loaded.tokenizer, PROMPT), 0, prompt_logprobs=True)
    run(engine, [request])
    assert choice.logprobs.token_logprobs == [token.logprob for token in request.on_chunk.logprobs]
    assert all(3 <= len(top) <= 4 and top[name] <= max(top.values()) for top, name in zip(
        choice.logprobs.top_logprobs, names, strict=True))  # fmt: skip
    more = client.completions.create(model="tiny", prompt=ids, max_tokens=4, echo=True, logprobs=0, temperature=0)
    assert more.choices[0].text.startswith(PROMPT)
    assert more.choices[0].logprobs.token_logprobs[0] is None  # nothing precedes it
    assert len(more.choices[0].logprobs.tokens) == len(ids) + more.usage.completion_tokens
    plain = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, echo=True, temperature=0)
    assert plain.choices[0].text == more.choices[0].text or plain.choices[0].text.startswith(PROMPT)


def test_echo_with_logprobs_of_a_prompt_of_one_id(served, loaded):
    id_ = loaded.tokenizer.encode(PROMPT)[-1]
    body = {"prompt": [id_], "echo": True, "logprobs": 0, "max_tokens": 0}
    [choice] = send(served, "POST", "/v1/completions", body)[2]["choices"]
    expected = {"tokens": [loaded.tokenizer.id2token[id_]], "token_logprobs": [None], "text_offset": [0]}
    assert choice["logprobs"] == {**expected, "top_logprobs": [None]}
    [more] = send(served, "POST", "/v1/completions", {**body, "max_tokens": 3, "ignore_eos": True})[2]["choices"]
    assert more["text"].startswith(choice["text"])
    assert more["logprobs"]["token_logprobs"][0] is None
    assert [len(more["logprobs"]["tokens"]), more["logprobs"]["text_offset"][1]] == [4, len(choice["text"])]


def test_a_stop_string_ends_the_text_before_it_and_frees_the_slot(client, served):
    arguments = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 60,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    free = client.completions.create(**arguments).choices[0].text
    stop = free[10:13]
    stopped = client.completions.create(**{**arguments, "max_tokens": 90_000}, stop=["never there", stop], logprobs=0)
    assert stopped.choices[0].text == free[: free.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert all(at <= free.index(stop) for at in stopped.choices[0].logprobs.text_offset)
    wait_until(lambda: served.engines["tiny"].occupancy() == (0, 0))


@pytest.mark.parametrize("stream", [False, True])
def test_usage_counts_the_tokens_up_to_the_stop_string(served, loaded, stream):
    """The engine delivers several tokens at once and learns of the stop string later; those are not counted."""
    body = {"prompt": PROMPT, "temperature": 1, "seed": 5, "ignore_eos": True}
    ids = alone(loaded, encode_prompt(loaded.tokenizer, PROMPT), Sampling(temperature=1.0, top_p=1.0, seed=5))
    texts = [loaded.tokenizer.decode(ids[:n]) for n in range(60)]
    end = next(n for n in range(41, 60) if texts[n][-1].isalnum() and len(texts[n]) > len(texts[n - 1]))
    text = texts[end]
    stop = next(text[start:] for start in range(len(text) - 1, -1, -1) if text.find(text[start:]) == start)
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    _, _, response = send(served, "POST", "/v1/completions", {**body, "max_tokens": 90_000, "stop": stop, **options})
    if stream:
        response = json.loads(response.split("data: ")[-2])
    assert response["usage"]["completion_tokens"] == end
    assert response["usage"]["total_tokens"] == response["usage"]["prompt_tokens"] + end


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_frees_the_slots(served, stream):
    engine = served.engines["tiny"]
    body = {"prompt": PROMPT, "max_tokens": 100_000, "n": 4, "stream": stream, "ignore_eos": True}
    before = engine.counters.finished["cancelled"]
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    wait_until(lambda: engine.occupancy().running == 4)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_until(lambda: engine.occupancy() == (0, 0))
    assert engine.counters.finished["cancelled"] == before + 4


def test_requests_beyond_the_queue_get_429(served, client):
    import openai

    engine = served.engines["tiny"]
    held = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=100_000, n=10, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(held))
    assert engine.occupancy() == (4, 6)
    with pytest.raises(openai.RateLimitError, match="busy"):
        client.completions.create(model="tiny", prompt=PROMPT)
    assert client.completions.create(model="other", prompt=PROMPT).choices  # the other run is not busy
    held.close()
    wait_until(lambda: engine.occupancy() == (0, 0))
    assert client.completions.create(model="tiny", prompt=PROMPT).choices
    with pytest.raises(openai.BadRequestError, match="11 texts"):
        client.completions.create(model="tiny", prompt=PROMPT, n=11)


def test_the_time_limit_ends_a_request(served, monkeypatch):
    from slm_jax.serve.completions import Limits

    monkeypatch.setattr(served.app, "limits", Limits(300, 100_000, 0.2))
    body = {"prompt": PROMPT, "max_tokens": 100_000, "ignore_eos": True}
    status, _, tree = send(served, "POST", "/v1/completions", body)
    assert (status, tree["error"]["code"]) == (504, "timeout")
    status, _, events = send(served, "POST", "/v1/completions", {**body, "stream": True})
    assert status == 200
    assert '"timeout"' in events.strip().splitlines()[-1]
    wait_until(lambda: served.engines["tiny"].occupancy() == (0, 0))


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "a number from 0 to 100, not -1"),
        ({"prompt": {"text": "x"}}, "prompt", "a text, a non-empty list of integers"),
        ({"prompt": [1, 10**9]}, "prompt[1]", "prompt[1] is 1000000000: the ids of this model are 0 to"),
        ({"prompt": [[1], [-1]]}, "prompt[1][0]", "prompt[1][0] is -1"),
        ({"prompt": [5] * 301}, "prompt", "301 tokens; the limit is 300"),
        ({"prompt": ["It", "It" * 301]}, "prompt[1]", "prompt[1] has "),
        ({"prompt": "word " * 9000}, None, "exceeds 10,000 bytes"),
        ({"max_tokens": 100_001}, "max_tokens", "exceeds the limit of 100,000"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
    ],
)
def test_invalid_requests_get_errors_in_openai_format(served, change, param, message):
    status, _, tree = send(served, "POST", "/v1/completions", {"prompt": PROMPT, **change})
    assert status == (413 if param is None else 400)
    assert tree["error"]["param"] == param
    assert message in tree["error"]["message"]
    assert tree["error"]["type"] == "invalid_request_error"


def test_errors_as_the_client_library_raises_them(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.completions.create(model="tiny", prompt="x", logit_bias={"5": 1})
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").vocab_size == 400 or client.models.retrieve("other").vocab_size > 265
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../tiny")


def test_requests_of_the_page_beyond_the_limit_get_429(served, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(served.app, "_vocabularies", lambda *a: release.wait(30) and [])
    with ThreadPoolExecutor(9) as pool:
        calls = [pool.submit(send, served, "GET", "/api/vocabularies") for _ in range(9)]
        wait_until(lambda: served.app._inspection._calls == 9)
        status, headers, tree = send(served, "GET", "/api/curve")
        assert (status, headers["retry-after"], tree["error"]["code"]) == (429, "1", "busy")
        assert send(served, "POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 1})[0] == 200
        release.set()
        assert {call.result()[0] for call in calls} == {200}


def test_short_prompts_do_not_wait_for_long_ones(served, monkeypatch):
    release = threading.Event()
    encode = Completion.encode

    def slow(completion):
        if len(completion.request.prompt) > 100:
            assert release.wait(30)
        encode(completion)

    monkeypatch.setattr(Completion, "encode", slow)
    monkeypatch.setattr("slm_jax.serve.app._LONG_CHARACTERS", 100)
    with ThreadPoolExecutor(6) as pool:
        body = {"prompt": "It " * 50, "max_tokens": 1}
        calls = [pool.submit(send, served, "POST", "/v1/completions", body) for _ in range(6)]
        wait_until(lambda: served.app._long_encoding._calls == 6)
        assert send(served, "POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 1})[0] == 200
        release.set()
        assert {call.result()[0] for call in calls} == {200}


def test_other_sites_and_unknown_hosts_are_refused(served):
    body = {"prompt": PROMPT, "max_tokens": 1}
    port = urlsplit(served.url).port
    for headers, status in (
        ({"Host": "evil.example"}, 421),  # DNS rebinding
        ({"Host": f"evil.example:{port}"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),  # what an HTML form can send without a preflight
        ({"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}, 200),
        ({"Host": f"[::1]:{port}"}, 200),
    ):
        actual, response_headers, _ = send(served, "POST", "/v1/completions", body, headers)
        assert actual == status, headers
        assert response_headers["access-control-allow-origin"] is None
    assert send(served, "GET", "/health", headers={"Host": "evil.example"})[0] == 421
    assert send(served, "OPTIONS", "/v1/completions", headers={"Origin": "https://evil.example"})[0] == 403


@pytest.mark.parametrize("path", ["/v1/completions", "/api/cut"])
def test_deeply_nested_json_is_refused(served, path):
    assert send(served, "POST", path, raw="[" * 9000)[0] == 400


def test_a_body_without_content_length_is_limited_too(served):
    parsed = urlsplit(served.url)
    with socket.create_connection((parsed.hostname, parsed.port), timeout=30) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {parsed.netloc}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        connection.sendall((b"1000\r\n" + b" " * 0x1000 + b"\r\n") * 3)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_client_refused_while_sending_receives_the_response(served):
    """The connection is not reset, or a client that reads only after sending would lose the response."""
    parsed = urlsplit(served.url)
    body = b" " * 150_000
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {parsed.netloc}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((parsed.hostname, parsed.port), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:50_000])
        while not connection.recv(1, socket.MSG_PEEK):
            pass
        for at in range(50_000, len(body), 1_000):  # writing to a closed connection fails the second time
            connection.sendall(body[at : at + 1_000])
        response = b"".join(iter(lambda: connection.recv(10_000), b""))
    assert response.startswith(b"HTTP/1.1 413")
    assert b"exceeds 10,000 bytes" in response


def test_no_request_reaches_the_file_system(served):
    for path in ("/..%2f..%2fetc%2fpasswd", "/../config.toml", "/app.py", "/v1/models/..%2f..", "/api/curve?run=/etc"):
        assert send(served, "GET", path)[0] == 404, path
    for method, path, status in (("GET", "/v1/completions", 405), ("GET", "/nothing", 404), ("POST", "/", 405)):
        actual, _, tree = send(served, method, path, {} if method == "POST" else None)
        assert (actual, tree["error"]["code"]) == (status, None)
    body = {"vocabulary": "/etc/passwd", "text": "x"}
    assert send(served, "POST", "/api/cut", body)[0] == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_lone_surrogate_is_transmitted(served, loaded, stream):
    ids = loaded.tokenizer.encode("\ud800")
    assert len(ids) == 3
    body = {"prompt": ids, "echo": True, "max_tokens": 0, "stream": stream}
    status, _, response = send(served, "POST", "/v1/completions", body)
    tree = json.loads(response.splitlines()[0].removeprefix("data: ")) if stream else response
    assert (status, tree["choices"][0]["text"]) == (200, "\ud800")
    body = {"prompt": "half an emoji \ud83d", "echo": True, "max_tokens": 0}
    status, _, tree = send(served, "POST", "/v1/completions", body)
    assert (status, tree["choices"][0]["text"]) == (200, body["prompt"])
    status, _, tree = send(served, "POST", "/api/cut", {"vocabulary": "tiny", "text": "\ud800"})
    assert (status, tree["characters"]) == (200, 1)


def test_health_metrics_and_curve(served):
    parser = pytest.importorskip("prometheus_client.parser")
    assert send(served, "GET", "/health")[2] == {"status": "ok", "failed": []}
    send(served, "POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "model": "other", "ignore_eos": True})

    def generated_tokens():
        families = parser.text_string_to_metric_families(send(served, "GET", "/metrics")[2])
        samples = {(s.name, s.labels.get("model"), s.labels.get("le")): s.value for f in families for s in f.samples}
        assert samples["slm_slots", "tiny", None] == 4
        assert samples["slm_first_token_seconds_bucket", "other", "+Inf"] > 0
        return samples["slm_drawn_tokens_total", "other", None]

    before = generated_tokens()
    send(served, "POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "model": "other", "ignore_eos": True})
    assert generated_tokens() == before + 5
    curve = send(served, "GET", "/api/curve?run=tiny")[2]
    assert curve["val_loss"] == [[300, 2.5]]
    assert len(curve["loss"]) <= 200
    assert curve["loss"][0][1] == pytest.approx(5, abs=0.01)


def test_the_page_polls_cheaply_and_loads_only_served_runs(served, loaded):
    (tiny, other) = send(served, "GET", "/api/runs")[2]["runs"]
    assert (tiny["id"], tiny["loaded"], tiny["saved"], tiny["step"]) == ("tiny", 300, None, 300)
    assert other["id"] == "other"
    status, headers, _ = send(served, "GET", "/api/curve?run=tiny&width=4")
    assert (status, headers["cache-control"]) == (200, "no-cache")
    again = send(served, "GET", "/api/curve?run=tiny&width=4", headers={"If-None-Match": headers["etag"]})
    assert (again[0], again[2]) == (304, "")
    assert send(served, "GET", "/api/curve?run=tiny&width=x")[0] == 400
    for body, expected in (({}, 400), ({"run": 3}, 400), ({"run": "../tiny"}, 404), ({"run": "none"}, 404)):
        assert send(served, "POST", "/api/load", body)[0] == expected
    status, _, tree = send(served, "POST", "/api/load", {"run": "tiny"})  # it has no tokenizer file, nor a checkpoint
    assert (status, str(loaded.run.path) in tree["error"]["message"]) == (409, True)
    assert send(served, "GET", "/api/report?run=tiny")[0] == 404
    loaded.run.report.write_text("<script>1</script>")
    status, headers, content = send(served, "GET", "/api/report?run=tiny")
    loaded.run.report.unlink()
    assert (status, content) == (200, "<script>1</script>")
    assert headers.get_all("content-security-policy")[0].startswith("sandbox allow-scripts; default-src 'none'")
    assert len(headers.get_all("content-security-policy")) == 1


def test_curves_skip_damaged_and_incomplete_metrics_rows(tmp_path):
    pytest.importorskip("starlette")
    from slm_jax.serve.runs import read_curves

    path = tmp_path / "metrics.jsonl"
    assert read_curves(path)["loss"] == []
    path.write_text('{"step": 1, "loss": 2.0}\nnonsense\n{"step": 2, "loss": null}\n{"step": 3, "lo')
    assert read_curves(path)["loss"] == [[1, 2.0]]


def test_the_api_key_protects_everything_but_the_page():
    """Without a server: authentication is a middleware."""
    import asyncio

    pytest.importorskip("starlette")
    from slm_jax.serve.auth import Auth

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = Auth(inner, KEY, ["my.name"], 100)

    def status(path, authorization=None, host=b"my.name:80"):
        headers = [(b"host", host)] + ([(b"authorization", authorization)] if authorization else [])
        sent = []

        async def receive():
            return {"type": "http.request", "body": b""}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
        asyncio.run(app(scope, receive, send))
        assert any(name == b"content-security-policy" for name, _ in sent[0]["headers"])
        return sent[0]["status"]

    for path in ("/v1/models", "/v1/completions", "/metrics", "/api/curve"):
        assert status(path) == status(path, b"Bearer wrong") == status(path, KEY.encode()) == 401
        assert status(path, f"Bearer {KEY}".encode()) == 200
    assert status("/") == status("/health") == status("/page.js") == 200
    assert status("/", host=b"other.name") == 421


def test_an_unknown_model_is_named_before_other_parameters(served):
    body = {"model": "gpt", "max_tokens": -1, "temperature": "hot", "prompt": PROMPT}
    status, _, tree = send(served, "POST", "/v1/completions", body)  # the model before the other parameters
    assert (status, tree["error"]["param"]) == (404, "model")
    assert send(served, "POST", "/v1/completions", {**body, "model": "tiny"})[0] == 400


def test_health_reports_programs_to_compile(served, monkeypatch):
    monkeypatch.setattr(Engine, "progress", property(lambda engine: Progress(3, 11 if engine.name == "tiny" else 3)))
    status, _, tree = send(served, "GET", "/health")
    assert status == 503
    assert tree == {"status": "starting", "failed": [], "starting": {"tiny": {"done": 3, "total": 11}}}
    assert send(served, "GET", "/health?code=200")[::2] == (200, tree)  # for the page, whose browser logs a 503
    assert send(served, "GET", "/health?code=404")[0] == 400
    assert send(served, "POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 1})[0] == 200


def test_health_reports_a_failed_engine(served, monkeypatch):
    monkeypatch.setattr(served.engines["tiny"], "failure", RuntimeError("broken"))
    assert send(served, "GET", "/health")[0] == 503


def test_an_idle_engine_has_no_occupancy(loaded):
    idle = Engine(loaded, slots=4, queue_size=0, block_slots=2)
    assert idle.occupancy() == (0, 0)
