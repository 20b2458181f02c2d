"""Request checks before anything is read: Host, Origin, API key, content type and size.

Pages in the user's browser can reach a server on loopback: any site can send requests to it, and by DNS rebinding (a
name of its own that suddenly resolves to 127.0.0.1) it could even read the responses. So a Host header with a name must
name this server; an Origin must be the host itself; a body must be JSON, which no HTML form can send; and no header
lets another origin read anything (no CORS).
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse, Response

from slm_jax.serve.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_DRAIN_FACTOR = 16  # of a refused body, at most this many times the maximum size is read
_DRAIN_SECONDS = 1  # without new data, after which draining stops
_MAX_DRAIN_SECONDS = 10
BODY_SECONDS = 30.0
"""Time from the headers of a request to the end of its body."""
_MAX_BODIES = 64
"""Maximum size of all incomplete bodies together, as a multiple of the maximum size of one."""
_KEY_PATHS = ("/v1/", "/api/", "/metrics")
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class AsciiJSONResponse(JSONResponse):
    """JSON in ASCII: generated text may contain a lone surrogate, which UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        """Encode the body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Auth:
    """ASGI middleware that refuses requests and adds security headers to responses."""

    def __init__(self, app: App, api_key: str, hosts: Iterable[str], max_body: int):
        """Wrap an application.

        Args:
            app: The ASGI application.
            api_key: The key that requests to the API must carry; empty: none.
            hosts: Names that the server is known by, besides localhost and the machine's name.
            max_body: Maximum size of a request body in bytes.
        """
        self._app = app
        self._max_body = max_body
        self._buffered = 0  # bytes of bodies that are incomplete
        self._key = _digest(api_key) if api_key else b""
        self._hosts = {"localhost", socket.gethostname().lower(), *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = {name.lower() for name, _ in message.get("headers", ())}
                extra = [
                    (name.encode(), value.encode()) for name, value in _HEADERS.items() if name.encode() not in own
                ]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            await self._answer(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # the server stops, and the time for requests in progress is over
            if not started:
                error = ApiError(503, "the server stopped before the response was complete")
                await AsciiJSONResponse(error.body(), error.status)(scope, receive, send_with_headers)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self._check(scope["method"], scope["path"], headers)
            if scope["method"] == "POST":
                async with asyncio.timeout(BODY_SECONDS):
                    receive = await self._read_body(headers, receive)
        except TimeoutError:
            error = ApiError(408, f"the body was not complete within {BODY_SECONDS:g} s", code="timeout")
            await self._refuse(AsciiJSONResponse(error.body(), error.status), receive, send)
            return
        except ApiError as error:
            extra_headers = {"www-authenticate": "Bearer"} if error.status == 401 else error.headers()
            await self._refuse(AsciiJSONResponse(error.body(), error.status, extra_headers), receive, send)
            return
        await self._app(scope, receive, send)

    async def _refuse(self, response: Response, receive: Receive, send: Send) -> None:
        """Respond immediately, then read what the client is still sending, within bounds.

        Closing the connection earlier would reset it, and the client would never see the response.
        """
        headers = [*response.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        remaining = _DRAIN_FACTOR * self._max_body
        more = True
        now = asyncio.get_running_loop().time
        end = now() + _MAX_DRAIN_SECONDS
        with contextlib.suppress(TimeoutError):
            while more and remaining > 0:
                # Not `wait_for` within a `timeout`: up to Python 3.11 it may swallow the cancellation.
                async with asyncio.timeout_at(min(end, now() + _DRAIN_SECONDS)):
                    message = await receive()
                remaining -= len(message.get("body", b""))
                more = message.get("more_body", False)
        await send({"type": "http.response.body", "body": b""})

    def _check(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Raise ApiError if the headers of a request are not acceptable."""
        host = headers.get("host", "")
        if not self._is_known_host(host):
            raise ApiError(421, f"unknown Host {host!r}: start the server with --allow_host to serve that name")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, f"requests from pages of {origin} are refused")
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and method != "GET":
            raise ApiError(403, "requests from pages of other sites are refused")
        if self._key and path.startswith(_KEY_PATHS):
            authorization = headers.get("authorization", "")
            digest = _digest(authorization.removeprefix("Bearer "))
            if not authorization.startswith("Bearer ") or not hmac.compare_digest(digest, self._key):
                message = "a valid API key is required: Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key")
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and has_body and content_type != "application/json":
            raise ApiError(415, "the body must be JSON: Content-Type: application/json")

    def _is_known_host(self, host: str) -> bool:
        """Return whether a Host header is an IP address or a name of this server; DNS rebinding needs a name."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        name = name.removesuffix(".").lower()
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> Receive:
        """Read the whole body and return a `receive` that replays it.

        Raises:
            ApiError: The body or all incomplete bodies exceed their maximum size, or the client disconnects.
        """
        too_large = ApiError(413, f"the body exceeds {self._max_body:,} bytes")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body:
            raise too_large
        data = bytearray()
        more = True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client disconnected before the body was complete")
                part = message.get("body", b"")
                data += part
                self._buffered += len(part)
                more = message.get("more_body", False)
                if len(data) > self._max_body:
                    raise too_large
                if self._buffered > _MAX_BODIES * self._max_body:
                    raise ApiError(429, "the server is busy: too many requests are being sent", None, "busy", 1)
        finally:
            self._buffered -= len(data)
        body: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": bytes(data), "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return body.pop() if body else await receive()

        return replay


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
