"""A load generator for any running endpoint: open loop (Poisson arrivals) or closed loop (workers), and its results.

In an open loop a request is sent when it is due, however many are running, and its times count from when it was due.
So an endpoint that falls behind cannot hide it by slowing its clients down.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

T = TypeVar("T")

TIMEOUT_S = 120.0
"""Seconds after which a request counts as an error, so that the load generator ends."""

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a request. `due`, `first` (the stream's first event) and `end` are in seconds of one clock.

    `status` is the HTTP status, None if there was no response. `error` says why there is no whole answer; a stream may
    end with an error after the status 200. `reply` is the JSON of an answer that was not streamed, `extension` the
    answer's `t2ray`.
    """

    due: float
    first: float | None
    end: float
    status: int | None
    tokens: int = 0
    error: str | None = None
    extension: Mapping[str, Any] = field(default_factory=dict)
    reply: Any = None

    @property
    def seconds(self) -> float:
        return self.end - self.due


class Client:
    """A client of one endpoint that keeps its connections: `async with Client("http://127.0.0.1:8000") as client:`."""

    def __init__(self, url: str, key: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # an open loop has any number of requests at a time
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            read_bufsize=2**20,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def ask(
        self, body: Mapping[str, Any], *, due: float | None = None, path: str = "/v1/chat/completions"
    ) -> Outcome:
        """Sends one completion request. It does not raise: an error is in the outcome."""
        return await self.call("POST", path, due=due, json=body)

    async def call(self, method: str, path: str, *, due: float | None = None, **content: Any) -> Outcome:
        """Sends any request; reads an answer of server-sent events as a stream."""
        due = time.perf_counter() if due is None else due
        first: float | None = None
        status: int | None = None
        try:
            async with self._http.request(method, self._url + path, **content) as response:
                status = response.status
                if response.content_type != "text/event-stream":
                    return _whole(due, status, await response.read())
                events = []
                async for line in response.content:
                    if line.startswith(b"data:"):
                        first = first or time.perf_counter()
                        events.append(line[5:].strip())
                return _streamed(due, first, events)
        except (aiohttp.ClientError, TimeoutError) as error:
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            return Outcome(due=due, first=first, end=time.perf_counter(), status=status, error=said)


def _whole(due: float, status: int, body: bytes) -> Outcome:
    end = time.perf_counter()
    try:
        reply = json.loads(body)
    except ValueError:  # metrics, or a proxy's error page
        reply = None
    if status >= 400:
        error = reply.get("error") if isinstance(reply, dict) else None
        said = error.get("message") if isinstance(error, dict) else body[:200].decode(errors="replace")
        return Outcome(due=due, first=None, end=end, status=status, error=f"{status}: {said}", reply=reply)
    fields = reply if isinstance(reply, dict) else {}
    return Outcome(
        due=due,
        first=None,
        end=end,
        status=status,
        tokens=(fields.get("usage") or {}).get("completion_tokens", 0),
        extension=fields.get("t2ray") or {},
        reply=reply,
    )


def _streamed(due: float, first: float | None, events: Sequence[bytes]) -> Outcome:
    """The outcome of a stream. It is parsed after its end, so that reading costs little while the endpoint answers."""
    end, error, tokens = time.perf_counter(), None, 0
    extension: dict[str, Any] = {}
    chunks = [json.loads(event) for event in events if event != b"[DONE]"]
    for chunk in chunks:
        if "error" in chunk:
            error = f"in the stream: {chunk['error'].get('message')}"
        extension = chunk.get("t2ray") or extension
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    if error is None and events[-1:] != [b"[DONE]"]:
        error = "in the stream: it was cut off"
    return Outcome(due=due, first=first, end=end, status=200, tokens=tokens, error=error, extension=extension)


def chat(
    content: str, model: str, *, max_tokens: int, stream: bool = False, ignore_eos: bool = False
) -> dict[str, Any]:
    """Returns the body of a greedy request with one user turn. A stream is asked for its usage, to count its tokens."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    if ignore_eos:
        body["ignore_eos"] = True
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


async def open_loop(
    send: Callable[[int, float], Awaitable[T]], rate: float, seconds: float, *, seed: int = 0
) -> list[T]:
    """Calls `send(number, due)` at the times of a Poisson process of `rate` per second; returns all results."""
    draw = random.Random(seed)
    tasks: list[asyncio.Task[T]] = []
    due = time.perf_counter()
    end = due + seconds
    while (due := due + draw.expovariate(rate)) < end:
        await asyncio.sleep(max(due - time.perf_counter(), 0.0))
        tasks.append(asyncio.ensure_future(send(len(tasks), due)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(send: Callable[[int], Awaitable[T]], workers: int, each: int) -> list[T]:
    """Calls `send(number)` by `workers` workers, each `each` times, one after the other; returns all results."""

    async def work(worker: int) -> list[T]:
        return [await send(worker + workers * i) for i in range(each)]

    return [result for results in await asyncio.gather(*map(work, range(workers))) for result in results]


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value that `share` of `values` do not exceed, interpolated linearly between two of them."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns counts, throughput, and percentiles in milliseconds.

    TTFT is the time to a stream's first event, TPOT the time per token after it. These and the latencies are those of
    requests with a whole answer; the others are counted by their status, as "no answer" or as "broken".
    """
    good = [outcome for outcome in outcomes if outcome.error is None]
    bad = [outcome for outcome in outcomes if outcome.error is not None]
    seconds = max((o.end for o in outcomes), default=0.0) - min((o.due for o in outcomes), default=0.0)
    streams = [(o, o.first) for o in good if o.first is not None]
    times = {
        "latency_ms": [o.seconds for o in good],
        "ttft_ms": [first - o.due for o, first in streams],
        "tpot_ms": [(o.end - first) / (o.tokens - 1) for o, first in streams if o.tokens > 1],
    }
    tokens = sum(o.tokens for o in good)
    return {
        "requests": len(outcomes),
        "answered": len(good),
        "errors": dict(Counter(_kind(o) for o in bad)),
        "first_error": bad[0].error if bad else None,
        "seconds": seconds,
        "requests_per_s": len(good) / seconds if seconds else 0.0,
        "tokens_per_s": tokens / seconds if seconds else 0.0,
        "tokens_each": statistics.fmean([o.tokens for o in good]) if good else 0.0,
        **{
            name: {key: 1000 * percentile(values, share) for key, share in QUANTILES.items()}
            for name, values in times.items()
            if values
        },
    }


def _kind(outcome: Outcome) -> str:
    if outcome.status is None:
        return "no answer"
    return "broken" if outcome.status < 400 else str(outcome.status)
