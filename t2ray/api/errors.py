"""Errors in OpenAI's shape, and the HTTP status of each of t2ray's errors.

`{"error": {"message": "...", "type": "invalid_request_error", "param": "n", "code": null}}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from t2ray.core import (
    Busy,
    ConfigError,
    ContextExceeded,
    DataError,
    ExpertError,
    GenerationError,
    ResourceError,
    T2RayError,
    UnknownExpert,
)

INVALID, SERVER = "invalid_request_error", "server_error"

# Status, type, code and seconds to wait before another try. An error's nearest listed class decides; an error without
# one is the server's own fault: 500.
STATUSES: dict[type[BaseException], tuple[int, str, str, int | None]] = {
    UnknownExpert: (404, INVALID, "not_found", None),
    ContextExceeded: (400, INVALID, "context_length_exceeded", None),
    ConfigError: (400, INVALID, "invalid_value", None),
    DataError: (400, INVALID, "invalid_value", None),
    ExpertError: (400, INVALID, "invalid_expert", None),
    Busy: (429, "rate_limit_error", "busy", 1),
    ResourceError: (503, SERVER, "unavailable", 5),
    GenerationError: (503, SERVER, "generation_failed", 1),
}
# The codes of the errors that Starlette itself raises: unknown path, method that the path does not have.
CODES = {404: "unknown_path", 405: "method_not_allowed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorDetail:
    """What went wrong: `param` names the parameter at fault, `code` is stable and meant for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """OpenAI's error shape."""

    error: ErrorDetail


@dataclass(kw_only=True)
class Refusal(Exception):
    """Raised to answer a request with an error: `Refusal(status=400, message="n is 9; ...", param="n")`.

    `retry_after` is in seconds.
    """

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None
    headers: Mapping[str, str] | None = None

    @property
    def detail(self) -> ErrorDetail:
        return ErrorDetail(message=self.message, type=self.type, param=self.param, code=self.code)

    @property
    def body(self) -> bytes:
        return to_json(asdict(ErrorReply(error=self.detail)))

    def response(self) -> Response:
        headers = dict(self.headers or {})
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        return Response(self.body, self.status, headers, media_type="application/json")


def refusal(error: BaseException, param: str | None = None, limit: str | None = None) -> Refusal:
    """The refusal that answers an error. The message of an error that is no `T2RayError` is not shown to clients.

    Args:
        param: the parameter that a `ConfigError` is about.
        limit: the parameter that said how long the answer may be, if one did.
    """
    if isinstance(error, Refusal):
        return error
    for kind in type(error).__mro__:
        if kind in STATUSES:
            status, type_, code, retry_after = STATUSES[kind]
            named, message = param if isinstance(error, ConfigError) else None, str(error)
            if isinstance(error, ContextExceeded) and param:
                prompt, answer, context = error.args[1:]
                asked = f"{answer:,} of {limit}" if limit else "at least 1 of the answer"
                remedy = f"shorten the {param}" + (f" or lower {limit}" if limit else "")
                message = (
                    f"the maximum context length is {context:,} tokens; this request has {prompt:,} of the {param} and "
                    f"{asked}, {prompt + answer:,} together; {remedy}"
                )
            return Refusal(status=status, message=message, type=type_, param=named, code=code, retry_after=retry_after)
    message = str(error) if isinstance(error, T2RayError) else "the server failed at this request; its log says why"
    return Refusal(status=500, message=message, type=SERVER, code="internal_error")


async def on_error(request: Request, error: Exception) -> Response:
    """The exception handler of `Refusal` and `T2RayError`."""
    trace = request.state.trace
    trace.error = type(error).__name__ if isinstance(error, T2RayError) else f"http_{_status(error)}"
    return refusal(error, trace.param, trace.limit).response()


async def on_http(request: Request, error: Exception) -> Response:
    """The exception handler of the errors that Starlette itself raises."""
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code)
    message = f"{error.detail}: {request.method} {request.url.path[:200]}"
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 405:  # a path's methods are routes of their own, of which the error names the first one's
        routes = [route for route in request.app.state.routes if route.matches(request.scope)[0] != Match.NONE]
        methods = {method for route in routes for method in route.methods}
        headers["allow"] = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
    return await on_error(request, Refusal(status=error.status_code, message=message, code=code, headers=headers))


async def on_fault(request: Request, error: Exception) -> Response:
    """The exception handler of all other errors.

    It runs outside the middleware that adds headers, so it adds them itself. Starlette raises the error again after it.
    """
    response = refusal(error).response()
    response.headers.update(request.state.trace.headers)
    return response


async def on_gone(request: Request, error: Exception) -> Response:
    """The exception handler for a client that has disconnected: nobody reads the response."""
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=499)


def _status(error: Exception) -> int:
    return error.status if isinstance(error, Refusal) else 500
