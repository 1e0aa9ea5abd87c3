"""The ASGI middleware around every request: request id, API key, limit of running requests, headers, log line.

Routes write into `Trace` what the log and the metrics say about their request. Running requests per key are counted in
each ingress process by itself. A HEAD is answered as the GET of its path would be, without the body. Not here: what a
role may do (`routes.py`).
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from t2ray.api.errors import SERVER, Refusal
from t2ray.api.keys import Key, Keys
from t2ray.config.serve import ApiConfig

LOG = logging.getLogger("t2ray.api")
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
# Without keys, a web site could let its own name point to this machine and so reach the endpoint through a visitor's
# browser. The browser sends that name as the host, so that only hosts of this form are served.
OWN_HOST = re.compile(r"(localhost|[\w.-]+\.localhost|[\d.]+|\[[\da-f:.]+\])(:\d+)?", re.IGNORECASE)
CLOSED_S = 10  # what a refused client is asked to wait, in seconds: about as long as a new start takes
OPEN = {"/", "/health", "/openapi.json"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(slots=True, kw_only=True)
class Trace:
    """What the log and the metrics say about one request."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    key: Key | None = None  # the key of the request, once it is checked
    slot: str | None = None  # the name of the key in whose running requests it counts
    status: int = 499  # stays if the client disconnects before there is an answer
    error: str | None = None
    model: str | None = None
    param: str | None = None  # the parameter that holds the prompt, once only the engine can refuse it
    limit: str | None = None  # the parameter that said how long the answer may be
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    ttft: float | None = None  # seconds to the first token of a stream
    backend_s: float = 0.0  # seconds spent waiting for the backend
    shown: dict[str, Any] = field(default_factory=dict)  # prompts and answers, if they are logged

    @property
    def headers(self) -> dict[str, str]:
        return SECURITY | {"x-request-id": self.request_id}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


@dataclass(slots=True)
class Door:
    """Whether new requests come in, and how many are inside: `app.state.door`, which the endpoint closes at its end."""

    closed: bool = False
    inside: int = 0

    @property
    def refusal(self) -> Refusal:
        """Answers a request that comes when the door is closed."""
        return Refusal(
            status=503,
            message="the endpoint is ending; ask again when it has started anew",
            type=SERVER,
            code="ending",
            retry_after=CLOSED_S,
        )


class Guard:
    """Wraps the application: admits or refuses each request, and records it."""

    def __init__(self, app: ASGIApp, *, config: ApiConfig, keys: Keys, door: Door) -> None:
        self._app = app
        self._door = door
        self._config = config
        self._keys = keys
        self._running: Counter[str | None] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        trace = Trace(request_id=given if SANE_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["trace"] = trace

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
                own = [(name.encode(), value.encode()) for name, value in trace.headers.items()]
                message["headers"] = [*message.get("headers", ()), *own]
            elif head:
                message["body"] = b""
            await send(message)

        head = scope["method"] == "HEAD"
        asked: Scope = {**scope, "method": "GET"} if head else scope
        app = self._admit(asked, headers, trace)
        self._running[trace.slot] += 1
        self._door.inside += 1
        try:
            await app(asked, receive, reply)
        except Exception as error:
            trace.status, trace.error = 500, type(error).__name__
            raise
        finally:
            self._running[trace.slot] -= 1
            self._door.inside -= 1
            self._record({**asked, "method": scope["method"]}, trace)

    def _admit(self, scope: Scope, headers: Headers, trace: Trace) -> ASGIApp:
        """Returns the application, or the response that refuses the request. All paths that are not open need a key."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not len(self._keys) and not OWN_HOST.fullmatch(headers.get("host", "")):
            return self._refuse(
                trace,
                Refusal(
                    status=403,
                    message=f"without API keys only localhost and addresses are served, not {headers.get('host')!r}; "
                    "configure a key",
                    code="host_not_allowed",
                ),
            )
        if path in OPEN or path.startswith("/page/"):
            return self._app
        key = self._keys.find(headers.get("authorization", ""))
        if key is None:
            said = "this API key is not known" if "authorization" in headers else "an API key is needed"
            return self._refuse(
                trace,
                Refusal(
                    status=401,
                    message=f"{said}; send the header `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                ),
            )
        trace.key = key
        if self._door.closed and scope["method"] != "GET":
            return self._refuse(trace, self._door.refusal)
        if scope["method"] != "POST":  # reads of the page and of monitors cost little and must work under load
            return self._app
        if self._running[key.name] >= self._config.max_streams:
            return self._refuse(
                trace,
                Refusal(
                    status=429,
                    message=f"{self._config.max_streams} requests with this key are running; wait for one to end",
                    type="rate_limit_error",
                    code="too_many_requests",
                    retry_after=1,
                ),
            )
        trace.slot = key.name
        return self._app

    def _refuse(self, trace: Trace, refusal: Refusal) -> ASGIApp:
        trace.error = f"http_{refusal.status}"
        return refusal.response()

    def _record(self, scope: Scope, trace: Trace) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        backend = scope["app"].state.backend
        if backend is not None:
            backend.observe("requests_total", 1, route=route, status=str(trace.status))
            if trace.error is not None:
                backend.observe("errors_total", 1, kind=trace.error)
            if trace.ttft is not None:
                backend.observe("ttft_seconds", trace.ttft)
            for what, tokens in (("prompt", trace.prompt_tokens), ("generation", trace.completion_tokens)):
                if tokens:
                    backend.observe(f"{what}_tokens_total", tokens)
            if trace.completion_tokens:
                backend.observe("request_seconds", trace.seconds)
                backend.observe("overhead_seconds", max(trace.seconds - trace.backend_s, 0.0))
        line = {
            "request_id": trace.request_id,
            "key": trace.key and trace.key.name,
            "method": scope["method"],
            "route": route,
            "status": trace.status,
            "model": trace.model,
            "prompt_tokens": trace.prompt_tokens,
            "completion_tokens": trace.completion_tokens,
            "ttft": None if trace.ttft is None else round(trace.ttft, 6),
            "seconds": round(trace.seconds, 6),
            "error": trace.error,
            **trace.shown,
        }
        LOG.info("%s", json.dumps(line, ensure_ascii=True))
