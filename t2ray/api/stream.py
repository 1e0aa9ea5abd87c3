"""Waiting for a backend while watching the client: calls that end together, merged streams, server-sent events.

When a client disconnects, whatever runs for it is cancelled. Not here: what an answer looks like (`shapes.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from t2ray.core import Delta, joined

T = TypeVar("T")


async def together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns the results of all calls. If one fails or this call is cancelled, all are cancelled."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Returns the result of `work`, which is cancelled if the client disconnects.

    The request's body must have been read before.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _end([task, gone])


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancels the tasks that still run and waits until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def merged(streams: Sequence[AsyncIterator[Delta]]) -> AsyncGenerator[dict[int, Delta]]:
    """Runs the streams side by side and yields what has arrived since the last turn: stream number -> one joined delta.

    A reader that is slower than the streams so gets fewer and larger pieces. The first error of a stream ends all.
    """
    arrived: asyncio.Queue[tuple[int, Delta] | asyncio.Task[None]] = asyncio.Queue()

    async def feed(index: int, stream: AsyncIterator[Delta]) -> None:
        async with aclosing(cast("AsyncGenerator[Delta]", stream)):
            async for delta in stream:
                arrived.put_nowait((index, delta))

    tasks = [asyncio.create_task(feed(index, stream)) for index, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(arrived.put_nowait)
    running = len(tasks)
    try:
        while running:
            items = [await arrived.get()]
            while not arrived.empty():
                items.append(arrived.get_nowait())
            pieces: dict[int, list[Delta]] = {}
            ended = [item for item in items if isinstance(item, asyncio.Task)]
            for item in items:
                if isinstance(item, tuple):
                    pieces.setdefault(item[0], []).append(item[1])
            if pieces:
                yield {index: joined(deltas) for index, deltas in pieces.items()}
            for task in ended:
                task.result()
            running -= len(ended)
    finally:
        await _end(tasks)


class EventStream(Response):
    """A response of server-sent events: `first`, which is already there, and those that follow."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            with suppress(ClientDisconnect):  # its generation has been cancelled, and nobody reads the rest
                await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for events in self._rest:
                await send({"type": "http.response.body", "body": events, "more_body": True})
        finally:  # also after an error, whose event has been sent: the connection ends, it does not break
            await send({"type": "http.response.body", "body": b"", "more_body": False})
