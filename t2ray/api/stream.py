"""Waiting for a backend with an eye on the client: calls that end together, streams that merge, events that are sent.

A client that goes away cancels what it waits for. Not here: what an answer looks like (`shapes.py`). Called by
`answers.py`.
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
    """The results of all calls; when one fails or this call is cancelled, so are the others."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects. The request's body must have been read.

    Raises:
        ClientDisconnect: it has gone.
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
    """Cancels what still runs and waits until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def merged(streams: Sequence[AsyncIterator[Delta]]) -> AsyncGenerator[dict[int, Delta]]:
    """What has arrived since the last turn, one delta for each stream that has any; the streams run side by side.

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
    """Server-sent events: the first, which has been waited for, and those that follow."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            with suppress(ClientDisconnect):  # whose generation has been cancelled; there is nobody to tell
                await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for events in self._rest:
                await send({"type": "http.response.body", "body": events, "more_body": True})
        finally:  # after a fault too, whose event has been sent: an end, not a broken connection
            await send({"type": "http.response.body", "body": b"", "more_body": False})
