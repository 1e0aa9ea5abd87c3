"""What Ray Serve's HTTP proxy does for t2ray: a connection without headers ends, and a response has one id.

Ray calls `middlewares` in the proxy's process where `deploy.CALLBACK` stands in its environment: `t2ray serve` sees to
that on a private Ray, and on a cluster whoever starts its nodes.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import uvicorn.config
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from t2ray.api.guard import SANE_ID

HEADERS_S = 20.0
"""After so many seconds a request's headers must be there."""


def middlewares() -> list[Middleware]:
    """Puts `Punctual` in the place of uvicorn's own protocol, and returns what stands around Ray's application."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{Punctual.__name__}"
    return [Middleware(OneRequestId)]


class OneRequestId:
    """Replaces an odd `x-request-id`, and leaves one in the response, where Ray's proxy adds whatever was sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).getlist("x-request-id")
        request_id = given[0] if len(given) == 1 and SANE_ID.fullmatch(given[0]) else uuid.uuid4().hex
        MutableHeaders(scope=scope)["x-request-id"] = request_id

        async def once(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, once)


class Punctual(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol, whose connections are closed when a request's headers take longer than `HEADERS_S`.

    uvicorn's own timeout begins after an answer, and a connection that has sent half a header stays for ever.
    """

    headers_s = HEADERS_S
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """The clock runs from the first byte on, however slowly others follow, until all headers are there."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.headers_s, self.transport.close)

    def _rest(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
