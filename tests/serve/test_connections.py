"""Clients that connect and stay silent, send half a request or read nothing, over real sockets."""

import contextlib
import http.client
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("httptools")

from slm_jax.serve import auth, connections  # noqa: E402
from slm_jax.serve.auth import AsciiJSONResponse, Auth  # noqa: E402
from slm_jax.serve.connections import BoundedProtocol, LogLimit, connection_limits  # noqa: E402
from tests.processes import Process  # noqa: E402

HALF_BODY = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
)

SERVER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from slm_jax.cli.serve import Options, _listen, _serve
from slm_jax.serve.auth import Auth
from slm_jax.utils.progress import show_log
from tests.serve.test_connections import answer
show_log()
options = Options(port=int(sys.argv[1]))
_serve(Auth(answer, "", [], 1000), options, _listen(options.host, options.port), "tiny", "x")
"""


async def answer(scope, receive, send):
    """Answer every request with OK."""
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    await AsciiJSONResponse("x" * 20_000_000 if scope["path"] == "/large" else "OK")(scope, receive, send)


@pytest.fixture
def server():
    """Server of at most five connections."""
    protocol = type("Protocol", (BoundedProtocol,), {"max_connections": 5})
    config = uvicorn.Config(Auth(answer, "", [], 1000), "127.0.0.1", 0, http=protocol, ws="none", log_level="error")
    running = uvicorn.Server(config)
    listening = config.bind_socket()
    listening.listen()
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    running.port = listening.getsockname()[1]
    yield running
    running.should_exit = True
    thread.join()


@pytest.fixture
def port(server):
    """Its port."""
    return server.port


def get(port, timeout=5):
    connection = http.client.HTTPConnection("localhost", port, timeout=timeout)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().read()
    finally:
        connection.close()


def open_socket(port, data=b""):
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sendall(data)
    return client


def read_all(client):
    """Read until the server closes the connection; an abort counts as the end."""
    data = b""
    try:
        while part := client.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize("first", [b"", b"GET /he", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he"])
def test_a_connection_without_complete_headers_is_closed(port, monkeypatch, first):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with open_socket(port, first) as client:
        start = time.monotonic()
        data = read_all(client)
        assert 0.2 < time.monotonic() - start < 5
        assert data.count(b"HTTP/1.1 200") == first.count(b"\r\n\r\n")


def test_endless_headers_are_cut_off(port):
    with open_socket(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ") as client:
        with contextlib.suppress(OSError):
            client.sendall(b"x" * 10_000_000 + b"\r\n\r\n")
        assert read_all(client) == b""


def test_a_small_request_after_many_on_one_connection_is_answered(port):
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 1000 + b"\r\n\r\n"
    with open_socket(port) as client:
        for _ in range(100):  # more than the limit of one header in all
            client.sendall(request)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_bodies_that_arrive_are_bounded_together(port, monkeypatch):
    monkeypatch.setattr(auth, "_MAX_BODIES", 2)
    half = HALF_BODY.replace(b"Length: 99", b"Length: 999") + b" " * 799
    clients = [open_socket(port, half) for _ in range(2)]
    with open_socket(port, half) as third:
        answer = read_all(third)
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"retry-after: 1" in answer
    for client in clients:
        client.sendall(b" " * 199)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.close()
    with open_socket(port, half + b" " * 199) as fourth:
        assert fourth.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_client_that_reads_nothing_is_disconnected(server, port, monkeypatch):
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.3)
    with open_socket(port, b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
        assert client.recv(1)
        start = time.monotonic()
        while server.server_state.connections:
            assert time.monotonic() - start < 10
            time.sleep(0.05)


def test_repeated_errors_are_logged_within_a_limit(caplog):
    limit = LogLimit(records=3, seconds=0.2)
    assert [limit.filter(None) for _ in range(5)] == [True, True, True, False, False]
    time.sleep(0.25)
    assert limit.filter(None)
    assert "2 more errors were not logged" in caplog.text


def test_a_half_sent_body_is_answered_with_408(port, monkeypatch):
    monkeypatch.setattr(auth, "BODY_SECONDS", 0.3)
    with open_socket(port, HALF_BODY) as client:
        assert read_all(client).startswith(b"HTTP/1.1 408 ")


def test_a_refused_body_that_trickles_in_is_not_read_for_ever(port, monkeypatch):
    monkeypatch.setattr(auth, "_MAX_DRAIN_SECONDS", 0.5)
    with open_socket(port, HALF_BODY.replace(b"Length: 99", b"Length: 9999")) as client:
        start = time.monotonic()
        with contextlib.suppress(OSError):  # the connection is reset
            while time.monotonic() - start < 8:
                client.sendall(b" ")
                time.sleep(0.1)
        assert time.monotonic() - start < 5


def test_idle_connections_make_room_for_new_ones(port):
    clients = [open_socket(port, b"GET /he") for _ in range(20)]
    assert get(port) == b'"OK"'
    closed = sum(not read_all(client) for client in clients[:15])
    assert closed == 15
    for client in clients:
        client.close()


def test_half_sent_bodies_make_room_for_new_connections(port):
    clients = [open_socket(port, HALF_BODY) for _ in range(20)]
    assert get(port) == b'"OK"'
    for client in clients:
        client.close()


def test_limits_are_below_the_descriptor_limit(monkeypatch):
    for limit in (64, 256, 1024, resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        limits = connection_limits()
        assert limits.connections >= 1
        assert limits.backlog >= 1
        if limit == resource.RLIM_INFINITY:
            assert limits.connections == 1024
        else:
            assert limits.connections + 2 * limits.backlog < limit


def test_a_server_of_few_descriptors_survives_silent_and_half_sent_requests():
    """100 silent sockets at 64 descriptors; then a signal while bodies are incomplete."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(port)]
    with Process(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("curl"):
                break
        clients = [open_socket(port, b"GET /he") for _ in range(100)]
        for _ in range(3):
            assert get(port) == b'"OK"'
        for client in clients:
            client.close()
        clients = [open_socket(port, HALF_BODY) for _ in range(5)]
        assert get(port) == b'"OK"'
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        log = process.stderr.read()
        for client in clients:
            client.close()
    assert time.monotonic() - start < 4
    assert process.returncode == 0, log
    assert "Traceback" not in log
    assert len(log) < 500, log
