"""Streams that break, clients that go away, slow readers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
from fake_backend import FakeBackend, served
from waiting import GUARD_S

from t2ray.api.stream import merged, together
from t2ray.core import Delta, GenerationError

ASK: dict[str, Any] = {"model": "t2ray:base", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("error", "said"),
    [(GenerationError("the replica died"), "the replica died"), (RuntimeError("a secret"), "its log says why")],
)
def test_a_stream_that_breaks_ends_with_an_error_in_openais_shape(error: Exception, said: str) -> None:
    async def main() -> None:
        async with served(backend) as url:
            async with httpx2.AsyncClient(base_url=f"{url}/v1", timeout=GUARD_S) as http:
                response = await http.post("/chat/completions", json=ASK | {"stream": True, "n": 2})
            assert response.status_code == 200
            *chunks, last = [json.loads(line[6:]) for line in response.text.splitlines() if line]
            assert len(chunks) >= 2 and all(chunk["choices"] for chunk in chunks)
            assert set(last["error"]) == {"message", "type", "param", "code"} and said in last["error"]["message"]
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
                stream = await client.chat.completions.create(**ASK, stream=True)
                got = []
                with pytest.raises(openai.APIError, match=said):
                    async for chunk in stream:
                        got.append(chunk.choices[0].delta.content)
                assert got == ["base", " answers"]

    backend = FakeBackend()
    backend.break_after, backend.failures["stream"] = 2, error
    asyncio.run(main())
    assert not backend.running
    assert ("errors_total", 1, {"kind": type(error).__name__}) in backend.observed
    assert len(backend.aborted) == 3  # of the two rows that one of them broke, and of the client's


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 2])
def test_a_client_that_goes_away_stops_its_generation(n: int, stream: bool, after: int) -> None:
    """Before the first token and after some, streamed and not."""

    async def main() -> None:
        async with served(backend) as url, httpx2.AsyncClient(base_url=f"{url}/v1", timeout=GUARD_S) as other:
            async with httpx2.AsyncClient(base_url=f"{url}/v1", timeout=GUARD_S) as http:
                asked = asyncio.create_task(read(http))
                await backend.paused.wait()
                while len(backend.running) < n:
                    await asyncio.sleep(0)
                asked.cancel()
            async with asyncio.timeout(GUARD_S):
                await backend.idle.wait()
            assert len(backend.aborted) == n and not backend.running
            backend.go.set()
            assert (await other.post("/chat/completions", json=ASK)).status_code == 200

    async def read(http: httpx2.AsyncClient) -> None:
        async with http.stream("POST", "/chat/completions", json=ASK | {"stream": stream, "n": n}) as response:
            async for _ in response.aiter_bytes():
                pass

    backend = FakeBackend()
    backend.pause_after = after
    asyncio.run(main())
    assert [tags["status"] for name, _, tags in backend.observed if name == "requests_total"] in (
        ["499", "200"], ["200", "200"]
    )  # fmt: skip


def test_a_token_is_sent_as_soon_as_it_is_there() -> None:
    async def main() -> None:
        async with served(backend) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(**ASK, stream=True)
            got = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
            assert got == ["base", " answers"] and backend.running and not backend.go.is_set()
            backend.go.set()
            assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "stop"

    backend = FakeBackend()
    backend.pause_after = 2
    asyncio.run(main())


def test_a_slow_reader_gets_fewer_larger_pieces_and_the_same_text() -> None:
    async def stream(name: str) -> AsyncIterator[Delta]:
        for i in range(5):
            await asyncio.sleep(0)
            yield Delta(text=f"{name}{i} ", finish_reason="stop" if i == 4 else None)

    async def main() -> None:
        turns = []
        async for turn in merged([stream("a"), stream("b")]):
            turns.append(turn)
            for _ in range(20):  # while both streams run on
                await asyncio.sleep(0)
        assert len(turns) == 2
        for index, name in enumerate("ab"):
            text = "".join(turn[index].text for turn in turns if index in turn)
            assert text == "".join(f"{name}{i} " for i in range(5))
            assert turns[-1][index].finish_reason == "stop"

    asyncio.run(main())


def test_when_one_call_fails_the_others_are_cancelled_and_have_ended() -> None:
    ended = []

    async def hang(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # cleaning up takes a turn
            ended.append(name)

    async def fail() -> None:
        await asyncio.sleep(0)
        raise GenerationError("no")

    async def main() -> None:
        with pytest.raises(GenerationError):
            await together([hang("a"), fail(), hang("b")])
        assert sorted(ended) == ["a", "b"]

    asyncio.run(main())


def test_many_streams_at_once_are_not_mixed_up() -> None:
    async def main() -> None:
        async with served(FakeBackend()) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def ask(i: int) -> str:
                text = f"question number {i}"
                stream = await client.completions.create(model="t2ray:math", prompt=text, temperature=0, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            answers = await asyncio.gather(*(ask(i) for i in range(40)))
            for i, answer in enumerate(answers):
                assert f"answers question number {i} with" in answer

    asyncio.run(main())
