"""What a monitor sees of the API: its health, HEAD, the closed door at the end, and the registry's problems."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Literal

import httpx2
import pytest
from fake_backend import FakeBackend, expert, served
from waiting import GUARD_S

from t2ray.api.app import create_api
from t2ray.config.serve import ApiConfig
from t2ray.core import GenerationError


@pytest.mark.parametrize("outcome", [None, GenerationError("the engine is stuck"), TimeoutError()])
def test_all_who_ask_for_the_health_at_once_share_one_check(
    outcome: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it fails: they must not wait for one another's."""
    monkeypatch.setattr("t2ray.api.app.FRESH_S", GUARD_S)
    backend, checks, go = FakeBackend(), 0, asyncio.Event()

    async def ready() -> None:
        nonlocal checks
        checks += 1
        await go.wait()
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(backend, "ready", ready)

    async def main() -> None:
        async with served(backend) as url, httpx2.AsyncClient(base_url=url, timeout=GUARD_S) as http:
            calls = [asyncio.create_task(http.get("/health")) for _ in range(12)]
            while not checks:
                await asyncio.sleep(0.01)
            calls[0].cancel()  # who asked first goes
            go.set()
            statuses = {(await call).status_code for call in calls[1:]} | {(await http.get("/health")).status_code}
            assert statuses == {200 if outcome is None else 503} and checks == 1

    asyncio.run(main())


def test_every_path_that_can_be_read_answers_head_without_a_body() -> None:
    async def main() -> None:
        async with served(FakeBackend()) as url, httpx2.AsyncClient(base_url=url, timeout=GUARD_S) as http:
            for path in ("/", "/page/app.js", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/models/t2ray"):
                head, full = await http.head(path), await http.get(path)
                assert (head.status_code, head.content) == (200, b"") and full.content, path
                assert head.headers["content-type"] == full.headers["content-type"]
            for path in ("/v1/experts", "/v1/experts/math", "/v1/load"):
                assert (await http.head(path)).status_code == 200
            assert (await http.head("/v1/experts/none")).status_code == 404
            assert (await http.head("/v1/chat/completions")).status_code == 405

    asyncio.run(main())


def test_a_closed_door_refuses_what_is_new_and_lets_what_runs_end() -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.pause_after = 2
        app = create_api(ApiConfig())
        app.state.backend = backend
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=GUARD_S) as http:
            body = {"model": "t2ray:math", "messages": [{"role": "user", "content": "17+25"}]}
            running = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            await backend.paused.wait()
            app.state.door.closed = True
            assert app.state.door.inside == 1
            for method, path in (
                ("POST", "/v1/chat/completions"), ("PUT", "/v1/experts/x"), ("DELETE", "/v1/experts/math"),
                ("GET", "/health"), ("HEAD", "/health"),
            ):  # fmt: skip
                refused = await http.request(method, path)
                assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0, (method, path)
            assert (await http.get("/v1/load")).status_code == (await http.get("/metrics")).status_code == 200
            backend.go.set()
            assert (await running).json()["choices"][0]["finish_reason"] == "stop"
            assert app.state.door.inside == 0

    asyncio.run(main())


def test_one_odd_entry_of_the_registry_takes_no_list_from_anybody() -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.experts["odd"] = expert("odd", created="yesterday")
        backend.experts["late"] = expert("late", created="9999-12-31T23:59:59-23:00")
        backend.problems = {"Math": "'Math' cannot name an expert", ".": "the registry cannot be listed"}
        async with served(backend) as url, httpx2.AsyncClient(base_url=url, timeout=GUARD_S) as http:
            created = {model["id"]: model["created"] for model in (await http.get("/v1/models")).json()["data"]}
            assert created["t2ray:odd"] == 0 < created["t2ray:math"]
            assert (await http.get("/v1/experts")).json()["problems"] == backend.problems

    asyncio.run(main())


@pytest.mark.parametrize("default", ["cls", "prompt"])
def test_models_are_listed_although_the_default_has_lost_its_experts(default: Literal["cls", "prompt"]) -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.experts["dispatch"] = replace(backend.experts["dispatch"], problem="it is damaged")
        backend.default, backend.strategies = default, ()
        async with served(backend) as url, httpx2.AsyncClient(base_url=url, timeout=GUARD_S) as http:
            listed = await http.get("/v1/models")
            assert listed.status_code == 200 and "t2ray" not in {model["id"] for model in listed.json()["data"]}
            body = {"model": "t2ray:cls", "messages": [{"role": "user", "content": "17+25"}]}
            refused = await http.post("/v1/chat/completions", json=body)
            assert refused.status_code == 503 and "'dispatch' cannot be used" in refused.json()["error"]["message"]

    asyncio.run(main())
