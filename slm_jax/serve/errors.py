"""Errors in the format that clients of the OpenAI API expect."""

from typing import Any

from typing_extensions import TypedDict  # as pydantic requires before Python 3.12


class ErrorDetail(TypedDict):
    """An error: cause and remedy, its class, the parameter at fault, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """Body of every response with a status of 400 or more, except 503 of /health."""

    error: ErrorDetail


class ApiError(Exception):
    """An error response.

    Attributes:
        status: HTTP status.
        message: Cause and remedy.
        param: Name of the parameter at fault, if any, as a path: `stop[0]`, `stream_options.include_usage`.
        code: Machine-readable code, if any.
        retry_after: Seconds after which to try again, for the header Retry-After; 0: no such header.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> ErrorBody:
        """Return the error in OpenAI's format."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, Any]:
        """Return the headers of the response."""
        return {"retry-after": str(self.retry_after)} if self.retry_after else {}
