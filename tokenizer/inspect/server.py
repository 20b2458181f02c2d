"""The page of `python -m tokenizer serve`: tokenize text while it is typed. Standard library only."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tokenizer.errors import TokenizerError
from tokenizer.hybrid import HybridTokenizer
from tokenizer.inspect.playground import MAX_TEXT_CHARACTERS, MEDIA_TYPES, WEB_FOLDER, PlaygroundApi, read_asset

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_MAX_BODY_BYTES = 8 * MAX_TEXT_CHARACTERS  # JSON may escape a character as several bytes
_MAX_DRAINED_BYTES = 64 * MAX_TEXT_CHARACTERS
_MAX_CALLS = 16  # requests that are answered or wait for it
_MAX_CONNECTIONS = 64  # each has a thread


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds a connection may stay silent

    def do_GET(self) -> None:
        """Serve the page, its static files and the endpoints without a body."""
        if not self._is_local():
            return
        url = urlsplit(self.path)
        files = {f"/{path.name}": path.name for path in WEB_FOLDER.iterdir() if path.suffix in MEDIA_TYPES}
        files["/"] = "playground.html"
        if url.path in files:
            self._send(HTTPStatus.OK, *read_asset(WEB_FOLDER / files[url.path]))
        elif url.path.startswith("/api/"):
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            self._answer(url.path.removeprefix("/api/"), query, {})
        else:
            self._send_error(HTTPStatus.NOT_FOUND, f"not found: {url.path}")

    do_HEAD = do_GET  # http.server looks methods up by this name

    def do_POST(self) -> None:
        """Serve the endpoints with a JSON body."""
        length = self.headers.get("Content-Length", "")
        if not self._is_local():
            self._drain()
            return
        if not length.isdecimal() or len(length) > 9 or int(length) > _MAX_BODY_BYTES:
            self.close_connection = True
            self._send_error(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"Content-Length must be a number of at most {_MAX_BODY_BYTES:,} bytes",
            )
            self._drain()
            return
        data = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":
            self._send_error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the content type must be application/json")
            return
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self._send_error(HTTPStatus.BAD_REQUEST, "the body must be a JSON object")
            return
        self._answer(urlsplit(self.path).path.removeprefix("/api/"), {}, body)

    def _answer(self, path: str, query: Mapping[str, str], body: Mapping[str, Any]) -> None:
        if not self.server.calls.acquire(blocking=False):
            self._send_error(
                HTTPStatus.TOO_MANY_REQUESTS, f"the server is busy: {_MAX_CALLS} requests are running or waiting"
            )
            return
        try:
            with self.server.lock:  # a tokenizer is loaded once, and threads would only slow each other down
                result = self.server.api(path, query, body)
        except TokenizerError as error:
            self._send_error(HTTPStatus.BAD_REQUEST, str(error))
            return
        finally:
            self.server.calls.release()
        if result is None:
            self._send_error(HTTPStatus.NOT_FOUND, f"not found: /api/{path}")
        else:
            self._send_json(HTTPStatus.OK, result)

    def _is_local(self) -> bool:
        """Refuse requests that name another host or come from another site.

        A page of another site can reach a loopback server through a host name that resolves to 127.0.0.1
        (DNS rebinding); its Host or Origin header gives it away.
        """
        port = self.server.server_address[1]
        allowed = {f"{name}:{port}" for name in ("localhost", "127.0.0.1", "[::1]")}
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        if host in allowed and (origin is None or origin.removeprefix("http://") == host):
            return True
        self.close_connection = True
        self._send_error(HTTPStatus.FORBIDDEN, f"only requests from http://localhost:{port} are allowed")
        return False

    def _drain(self) -> None:
        """Read the rest of a refused request: closing with unread input would reset the connection."""
        self.connection.settimeout(1)  # seconds of silence
        remaining = _MAX_DRAINED_BYTES
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while remaining > 0:
                data = self.rfile.read1(65_536)
                if not data:
                    break
                remaining -= len(data)

    def _send_error(self, status: HTTPStatus, message: str) -> None:
        self._send_json(status, {"error": {"message": message}})

    def _send_json(self, status: HTTPStatus, value: object) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: HTTPStatus, data: bytes, media_type: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": media_type, "Content-Length": str(len(data)), **SECURITY_HEADERS}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            self.send_header("Retry-After", "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: a line for every key pressed would only be noise."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, api: PlaygroundApi) -> None:
        self.api = api
        self.lock = threading.Lock()
        self.calls = threading.BoundedSemaphore(_MAX_CALLS)
        self._connections = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a connection in a thread of its own; close it if there are too many."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a connection until it is closed."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report errors of this program only: a client that disconnects is none."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def open_server(names: list[str], load: Callable[[str], HybridTokenizer], port: int) -> ThreadingHTTPServer:
    """Open the playground server on the loopback interface; run it with `serve_forever`.

    Args:
        names: Names of the vocabularies, in display order. The first is loaded right away.
        load: Loads the tokenizer of a name.
        port: TCP port; 0 for any free one.

    Raises:
        TokenizerError: The first tokenizer cannot be loaded, or the port cannot be opened.
    """
    api = PlaygroundApi(names, load)
    api.tokenizer(names[0])
    try:
        return _Server(port, api)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TokenizerError(f"cannot listen on port {port}: {reason}; try another --port") from None


def serve(names: list[str], load: Callable[[str], HybridTokenizer], port: int) -> None:
    """Serve the playground until Ctrl-C; see `open_server` for the arguments."""
    with open_server(names, load, port) as server:
        print(f"http://localhost:{server.server_address[1]}/  (this machine only; stop with Ctrl-C)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
