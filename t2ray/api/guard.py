"""The ASGI middleware around every request: its id, its key, its slot, its headers, its line in the log.

`Trace` is where a route notes what the log and the metrics say of its request. A key's slots are counted in each
ingress process. Not here: what a role may do, and what a body holds (the routes). Called by `app`.
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

from t2ray.api.errors import Refusal
from t2ray.api.keys import Key, Keys
from t2ray.config.serve import ApiConfig

LOG = logging.getLogger("t2ray.api")
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
# Without keys a page of any web site could have its own name point to this machine; a browser then sends that name.
OWN_HOST = re.compile(r"(localhost|[\w.-]+\.localhost|[\d.]+|\[[\da-f:.]+\])(:\d+)?", re.IGNORECASE)
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
    """One request, as the log has it."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    key: Key | None = None  # whose it is, once that is known
    slot: str | None = None  # the key whose number of running requests it counts in
    status: int = 499  # what it stays when the client has gone before an answer
    error: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft: float | None = None
    backend_s: float = 0.0
    shown: dict[str, Any] = field(default_factory=dict)  # prompts and answers, where they are logged

    @property
    def headers(self) -> dict[str, str]:
        return SECURITY | {"x-request-id": self.request_id}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


class Guard:
    """Wraps the application; see the module."""

    def __init__(self, app: ASGIApp, *, config: ApiConfig, keys: Keys) -> None:
        self._app = app
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
            await send(message)

        app = self._admit(scope, headers, trace)
        self._running[trace.slot] += 1
        try:
            await app(scope, receive, reply)
        except Exception as error:
            trace.status, trace.error = 500, type(error).__name__
            raise
        finally:
            self._running[trace.slot] -= 1
            self._record(scope, trace)

    def _admit(self, scope: Scope, headers: Headers, trace: Trace) -> ASGIApp:
        """The application, or what refuses this request instead. Every path that is not open needs a key."""
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
        if scope["method"] != "POST":  # what the page and a monitor read costs little and goes on under load
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
            if trace.completion_tokens:
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
