"""The FastAPI application: `create_api(config)`. Until its owner sets `app.state.backend`, routes answer 503.

    app = create_api(ApiConfig())
    app.state.backend = backend

Every request passes `Guard` (request id, API key, limit of running requests, headers, log) before its route. This
module adds what a monitor asks for, `/health` and `/metrics`, and corrects FastAPI's `/openapi.json`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from t2ray.api import page, routes
from t2ray.api.backend import Backend
from t2ray.api.errors import SERVER, ErrorReply, Refusal, on_error, on_fault, on_gone, on_http, refusal
from t2ray.api.guard import Door, Guard
from t2ray.api.keys import Keys
from t2ray.api.responses import ResponsesRequest
from t2ray.api.routes import backend_of, refused, reply
from t2ray.api.schema import AdaptationBody, ChatRequest, CompletionRequest
from t2ray.config.serve import ApiConfig
from t2ray.core import T2RayError, __version__

HEALTH_S = 10.0  # the health check fails when its generation of one token takes longer
FRESH_S = 1.0  # an outcome answers for so long

monitoring = APIRouter()


def create_api(config: ApiConfig) -> FastAPI:
    """Returns the application with all its routes and error handlers, and without a backend.

    Raises:
        ConfigError: the API keys cannot be read.
    """
    keys = Keys.load(config)
    app = FastAPI(title="t2ray", version=__version__, docs_url=None, redoc_url=None)
    app.state.config = config
    app.state.backend = None
    app.state.health = Health()
    app.state.door = Door()
    app.include_router(routes.router)
    app.include_router(monitoring)
    app.include_router(page.router)
    app.state.routes = [*routes.router.routes, *monitoring.routes, *page.router.routes]
    app.add_exception_handler(Refusal, on_error)
    app.add_exception_handler(T2RayError, on_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientDisconnect, on_gone)
    app.add_exception_handler(Exception, on_fault)
    app.add_middleware(Guard, config=config, keys=keys, door=app.state.door)
    if config.cors_origins:  # outside the guard: a preflight request has no key, and scripts must see refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],  # OpenAI's client sends a dozen x-stainless-* of its own; none of them opens anything
            expose_headers=["x-request-id", "retry-after"],
        )
    app.openapi = cache(partial(_document, app.openapi, secured=len(keys) > 0))  # type: ignore[method-assign]
    return app


class Health:
    """The health check: one generation at a time, whose outcome answers all who ask meanwhile and for a second after.

    Anyone may ask, and each check costs a generation, or `HEALTH_S` seconds where none ends.
    """

    def __init__(self) -> None:
        self._check: asyncio.Task[Refusal | None] | None = None
        self._fresh_until = 0.0

    async def check(self, request: Request) -> None:
        """Returns if a generation of one token works.

        Raises:
            Refusal: it failed or did not end within `HEALTH_S` seconds, the endpoint is ending, or there is no backend
                yet.
        """
        backend = backend_of(request)
        if request.app.state.door.closed:
            raise request.app.state.door.refusal
        if self._check is None or (self._check.done() and time.monotonic() > self._fresh_until):
            self._check = asyncio.create_task(self._checked(backend))
        bad = await asyncio.shield(self._check)  # who asked first may go
        if bad is not None:
            raise replace(bad)

    async def _checked(self, backend: Backend) -> Refusal | None:
        try:
            async with asyncio.timeout(HEALTH_S):
                await backend.ready()
        except TimeoutError:
            message = f"no generation was finished within {HEALTH_S:g} s"
            return Refusal(status=503, message=message, type=SERVER, code="stalled", retry_after=5)
        except T2RayError as error:
            return refusal(error)
        finally:
            self._fresh_until = time.monotonic() + FRESH_S
        return None


@monitoring.get(
    "/health",
    responses={
        200: {"content": {"application/json": {"schema": {"type": "object", "required": ["status"]}}}},
        503: {"model": ErrorReply},
    },
)
async def health(request: Request) -> Response:
    """Answers 200 if a generation of one token works."""
    await request.app.state.health.check(request)
    return reply({"status": "ok"})


@monitoring.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refused()},
)
async def metrics(request: Request) -> Response:
    """Answers all metrics in Prometheus' text format."""
    text = await backend_of(request).metrics()
    return Response(text, media_type="text/plain; version=0.0.4")


def _document(openapi: Callable[[], dict[str, Any]], *, secured: bool) -> dict[str, Any]:
    """Returns FastAPI's document, with the bodies that routes read themselves and without FastAPI's own 422 errors."""
    document = openapi()
    bodies = [(model, "validation") for model in (ChatRequest, CompletionRequest, ResponsesRequest, AdaptationBody)]
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
