"""What stands around Ray Serve's application in its HTTP proxy, on a real uvicorn; and what `/metrics` shows."""

from __future__ import annotations

import asyncio
import inspect
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
import uvicorn
from endpoint import free_port
from ray.serve._private.http_util import RequestIdMiddleware
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from waiting import GUARD_S

from t2ray.cluster.serve.deploy import CALLBACK
from t2ray.cluster.serve.proxy import OneRequestId, Punctual, middlewares
from t2ray.cluster.serve.scrape import own
from t2ray.cluster.serve.traces import TRACED, processors, traced
from t2ray.core import ConfigError


class Hasty(Punctual):
    headers_s = 0.1


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the id that it saw, in a header of its own beside Ray's."""
    seen = dict(scope["headers"])[b"x-request-id"].decode()
    await Response(seen, headers={"x-request-id": seen})(scope, receive, send)


@asynccontextmanager
async def proxied(protocol: Any) -> AsyncIterator[int]:
    """The application as Ray's proxy serves it; its port."""
    port = free_port()
    app = OneRequestId(RequestIdMiddleware(application))
    server = uvicorn.Server(
        uvicorn.Config(lambda: app, factory=True, port=port, http=protocol, lifespan="off", log_level="critical")
    )
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield port
    finally:
        server.should_exit = True
        await task


def test_a_response_has_one_request_id_and_never_an_odd_one() -> None:
    async def main() -> None:
        async with proxied("auto") as port, httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            fine = await http.get("/", headers={"x-request-id": "mine-7"})
            assert fine.headers.get_list("x-request-id") == ["mine-7"] == [fine.text]
            odd: list[list[tuple[str, str]]] = [[], [("x-request-id", "<b>")], [("x-request-id", "a" * 65)]]
            odd += [[("x-request-id", "one"), ("x-request-id", "two")]]
            for headers in odd:
                replaced = await http.get("/", headers=headers)
                (given,) = replaced.headers.get_list("x-request-id")
                assert given == uuid.UUID(given).hex == replaced.text

    asyncio.run(main())


def test_headers_that_never_end_end_the_connection_and_a_connection_that_is_used_stays() -> None:
    async def main() -> None:
        async with proxied(Hasty) as port:
            kept, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):
                writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
                assert (await kept.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                await kept.readexactly(32)
                await asyncio.sleep(0.15)  # longer than headers may take
            for beginning in (b"", b"GET /a", b"GET / HTTP/1.1\r\nhost: a\r\nx-slow: "):
                reader, half = await asyncio.open_connection("127.0.0.1", port)
                half.write(beginning)
                if beginning:  # a byte later gains no time
                    await asyncio.sleep(0.05)
                    half.write(b"a")
                await ended(reader, half)
            writer.write(b"GET / HTTP/1.1\r\nx")  # also the second request of a connection
            await ended(kept, writer)

    async def ended(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await asyncio.wait_for(reader.read(), GUARD_S) == b""
        writer.close()
        await writer.wait_closed()

    asyncio.run(main())


def test_ray_calls_what_its_variable_names_and_uvicorn_then_takes_the_punctual_protocol(monkeypatch: Any) -> None:
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    (path,) = CALLBACK.values()
    assert path == f"{middlewares.__module__}:{middlewares.__name__}"
    assert [middleware.cls for middleware in middlewares()] == [OneRequestId]
    config = uvicorn.Config(application)
    config.load()
    assert config.http_protocol_class is Punctual


NODE = """\
# HELP ray_t2ray_prompt_tokens_total tokens
# TYPE ray_t2ray_prompt_tokens_total counter
ray_t2ray_prompt_tokens_total{{WorkerId="{id}"}} {value}.0
# HELP ray_t2ray_ttft_seconds t2ray's
# TYPE ray_t2ray_ttft_seconds histogram
ray_t2ray_ttft_seconds_bucket{{WorkerId="{id}",le="0.1"}} 3.0
ray_t2ray_ttft_seconds_count{{WorkerId="{id}"}} 3.0
# HELP ray_serve_handle serve's, of t2ray
# TYPE ray_serve_handle gauge
ray_serve_handle{{application="_t2ray_"}} 1.0
# HELP ray_t2ray_batch_rows rows
# TYPE ray_t2ray_batch_rows gauge
ray_t2ray_batch_rows{{WorkerId="{id}"}} 2.0
"""


def test_metrics_are_t2ray_s_own_each_family_together_and_vllm_s_names_beside() -> None:
    lines = own([NODE.format(id="a", value=7), NODE.format(id="b", value=8)], "tiny").splitlines()
    assert lines == [
        "# HELP ray_t2ray_prompt_tokens_total tokens",
        "# TYPE ray_t2ray_prompt_tokens_total counter",
        'ray_t2ray_prompt_tokens_total{WorkerId="a"} 7.0',
        'ray_t2ray_prompt_tokens_total{WorkerId="b"} 8.0',
        "# HELP vllm:prompt_tokens_total tokens",
        "# TYPE vllm:prompt_tokens_total counter",
        'vllm:prompt_tokens_total{model_name="tiny",WorkerId="a"} 7.0',
        'vllm:prompt_tokens_total{model_name="tiny",WorkerId="b"} 8.0',
        "# HELP ray_t2ray_ttft_seconds t2ray's",
        "# TYPE ray_t2ray_ttft_seconds histogram",
        'ray_t2ray_ttft_seconds_bucket{WorkerId="a",le="0.1"} 3.0',
        'ray_t2ray_ttft_seconds_count{WorkerId="a"} 3.0',
        'ray_t2ray_ttft_seconds_bucket{WorkerId="b",le="0.1"} 3.0',
        'ray_t2ray_ttft_seconds_count{WorkerId="b"} 3.0',
        "# HELP vllm:time_to_first_token_seconds t2ray's",
        "# TYPE vllm:time_to_first_token_seconds histogram",
        'vllm:time_to_first_token_seconds_bucket{model_name="tiny",WorkerId="a",le="0.1"} 3.0',
        'vllm:time_to_first_token_seconds_count{model_name="tiny",WorkerId="a"} 3.0',
        'vllm:time_to_first_token_seconds_bucket{model_name="tiny",WorkerId="b",le="0.1"} 3.0',
        'vllm:time_to_first_token_seconds_count{model_name="tiny",WorkerId="b"} 3.0',
        "# HELP ray_t2ray_batch_rows rows",
        "# TYPE ray_t2ray_batch_rows gauge",
        'ray_t2ray_batch_rows{WorkerId="a"} 2.0',
        'ray_t2ray_batch_rows{WorkerId="b"} 2.0',
    ]


def test_traces_are_sent_where_a_collector_is_named_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert traced({}) == traced({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}) == {}
    collector = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    monkeypatch.delitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", raising=False)
    with pytest.raises(ConfigError, match=r"t2ray\[traces\]"):
        traced(collector)
    monkeypatch.undo()
    assert traced(collector) == TRACED
    assert traced(collector | {"RAY_SERVE_TRACING_SAMPLING_RATIO": "0.1"}).keys() == {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"
    }
    path = TRACED["RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"]
    assert path == f"{processors.__module__}:{processors.__name__}" and not inspect.signature(processors).parameters
