"""The FastAPI application: `create_api(config)`. Its owner sets `app.state.backend` before the first request.

    app = create_api(ApiConfig())
    app.state.backend = backend

A request passes the guard (id, key, slot, headers, log), then its route. Not here: the model, Ray, the port. Called by
`cluster.serve`, which gives the backend of Ray Serve's handles, and by tests, which give a fake.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from t2ray.api import page, routes
from t2ray.api.errors import SERVER, ErrorReply, Refusal, on_error, on_fault, on_gone, on_http
from t2ray.api.guard import Guard
from t2ray.api.keys import Keys
from t2ray.api.routes import backend_of, refused, reply
from t2ray.api.schema import AdaptationBody, ChatRequest, CompletionRequest
from t2ray.config.serve import ApiConfig
from t2ray.core import T2RayError, __version__

HEALTH_S = 10.0  # a generation of one token that takes longer counts as none
FRESH_S = 1.0  # a good answer is given again for so long: the check is open to everyone, and a generation costs

monitor = APIRouter()


def create_api(config: ApiConfig) -> FastAPI:
    """The application.

    Raises:
        ConfigError: the keys cannot be read.
    """
    keys = Keys.load(config)
    app = FastAPI(title="t2ray", version=__version__, docs_url=None, redoc_url=None)
    app.state.config = config
    app.state.backend = None
    app.state.health = Health()
    app.include_router(routes.router)
    app.include_router(monitor)
    app.include_router(page.router)
    app.add_exception_handler(Refusal, on_error)
    app.add_exception_handler(T2RayError, on_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientDisconnect, on_gone)
    app.add_exception_handler(Exception, on_fault)
    app.add_middleware(Guard, config=config, keys=keys)
    if config.cors_origins:  # outside the guard: a preflight has no key, and a refusal must be readable too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.openapi = cache(partial(_document, app.openapi, secured=len(keys) > 0))  # type: ignore[method-assign]
    return app


class Health:
    """Whether a generation works, asked once for all who want to know at the same time."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._good_until = 0.0

    async def check(self, request: Request) -> None:
        """Raises Refusal or T2RayError where it does not."""
        async with self._lock:
            if time.monotonic() < self._good_until:
                return
            try:
                async with asyncio.timeout(HEALTH_S):
                    await backend_of(request).ready()
            except TimeoutError:
                message = f"no generation was finished within {HEALTH_S:g} s"
                raise Refusal(status=503, message=message, type=SERVER, code="stalled", retry_after=5) from None
            self._good_until = time.monotonic() + FRESH_S


@monitor.get(
    "/health",
    responses={
        200: {"content": {"application/json": {"schema": {"type": "object", "required": ["status"]}}}},
        503: {"model": ErrorReply},
    },
)
async def health(request: Request) -> Response:
    """200 when a generation works."""
    await request.app.state.health.check(request)
    return reply({"status": "ok"})


@monitor.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refused()},
)
async def metrics(request: Request) -> Response:
    """All metrics in Prometheus' text format."""
    text = await backend_of(request).metrics()
    return Response(text, media_type="text/plain; version=0.0.4")


def _document(openapi: Callable[[], dict[str, Any]], *, secured: bool) -> dict[str, Any]:
    """`/openapi.json`: FastAPI's, with the bodies that routes read themselves, and without errors of its own making."""
    document = openapi()
    bodies = [(model, "validation") for model in (ChatRequest, CompletionRequest, AdaptationBody)]
    _, definitions = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    components = document["components"]
    components["schemas"] |= definitions["$defs"]
    if secured:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if secured and path.startswith(("/v1/", "/metrics")):
                operation["security"] = [{"key": []}]
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    return document
