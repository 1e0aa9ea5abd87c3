"""What the API refuses, how, and that nothing reaches the model then."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import httpx2
import pytest
from fake_backend import FakeBackend, served
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import GUARD_S

from t2ray.api.app import create_api
from t2ray.config.serve import ApiConfig

CHAT = {"model": "t2ray:base", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "t2ray:base", "prompt": "hi"}
SMALL = ApiConfig(
    max_body_bytes=4000, max_upload_bytes=5000, max_messages=3, max_prompt_chars=100, max_tokens=32, max_n=3,
    max_prompts=3, max_stop=2
)  # fmt: skip


app_of = cache(create_api)  # it is assembled at its first request, which takes longer than all others


def refused(
    body: Any, path: str = "chat/completions", config: ApiConfig = SMALL, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Status and error of a request, in process; the model must not have been asked."""
    backend = FakeBackend()

    async def main() -> httpx2.Response:
        app = app_of(config)
        app.state.backend = backend
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1") as http:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            method = "PUT" if path.startswith("experts") else "POST"
            return await http.request(
                method, f"/v1/{path}", content=content, headers={"content-type": "application/json"} | (headers or {})
            )

    response = asyncio.run(main())
    assert not backend.calls, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 2000
    return response.status_code, error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 4}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": 33}, "max_tokens"),
        ({"max_completion_tokens": 33}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", "b", "c"]}, "stop"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": "x" * 257}, "stop"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"logit_bias": {"50": 101}}, "logit_bias.50"),
        ({"logit_bias": {"hello": 1}}, "logit_bias.hello"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"guided_json": {}}, "guided_json"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"temprature": 1}, "temprature"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 4}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 51}] * 2}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "nam": "x"}]}, "messages[0].nam"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "messages[0].content",
        ),
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_is_wrong_with_a_chat_is_named(change: dict[str, Any], param: str) -> None:
    status, error = refused(CHAT | change)
    assert (status, error["param"]) == (400, param)
    assert param.split(".")[-1].split("[")[0] in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": [1, -2]}, "prompt[0][1]"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [1] * 101}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt[0]"),
        ({"prompt": "x" * 101}, "prompt"),
        ({"prompt": ["a", "b"], "n": 2}, "n"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_is_wrong_with_a_text_is_named(change: dict[str, Any], param: str) -> None:
    status, error = refused(TEXT | change, "completions")
    assert (status, error["param"]) == (400, param)


def test_a_misspelt_parameter_gets_the_nearest_one() -> None:
    assert "did you mean 'temperature'?" in refused(CHAT | {"temprature": 1})[1]["message"]
    del (body := dict(CHAT))["messages"]
    assert refused(body)[1] == {
        "message": "the parameter 'messages' is missing",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "missing_parameter",
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"{} {}",
        b"[" * 3000,
        b'{"a":' * 600,
        json.dumps(CHAT).replace('"hi"', "NaN").encode(),
        (json.dumps(CHAT)[:-1] + ', "temperature": NaN}').encode(),
        (json.dumps(CHAT)[:-1] + ', "temperature": Infinity}').encode(),
        (json.dumps(CHAT)[:-1] + ', "temperature": 1e999}').encode(),
        (json.dumps(CHAT)[:-1] + ', "seed": 1e999}').encode(),
        (json.dumps(CHAT)[:-1] + ', "n": ' + "9" * 3000 + "}").encode(),
        json.dumps(CHAT).replace("hi", "\\ud800").encode(),
        json.dumps(CHAT).replace("hi", "\\udc00\\ud800").encode(),
        json.dumps(CHAT).encode().replace(b"hi", b"\xff\xfe"),
        json.dumps(CHAT).encode("utf-16"),
        b"\x00" * 100,
    ],
    ids=range(19),
)
def test_what_is_no_strict_json_is_refused(body: bytes) -> None:
    assert refused(body)[0] == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
)


@given(JSON)
@settings(max_examples=40, deadline=None)
def test_any_json_at_all_is_answered_with_a_client_error(value: Any) -> None:
    for path, sound, key in (("chat/completions", CHAT, "messages"), ("completions", TEXT, "prompt")):
        assert refused(value, path, ApiConfig())[0] == 400
        assert refused(sound | {key: {"x": value}}, path, ApiConfig())[0] == 400


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_form_of_another_web_site_is_no_request(kind: str) -> None:
    """These are what a browser sends across origins without asking first."""
    status, error = refused(CHAT, headers={"content-type": kind})
    assert (status, error["code"]) == (400, "content_type")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "", "localhost.evil.example"])
def test_without_keys_a_foreign_host_name_is_refused(host: str) -> None:
    status, error = refused(CHAT, headers={"host": host})
    assert (status, error["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_however_it_comes(chunked: bool) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    async def main() -> None:
        backend = FakeBackend()
        async with served(backend, SMALL) as url, httpx2.AsyncClient(base_url=f"{url}/v1", timeout=GUARD_S) as http:
            content: Any = endless() if chunked else b" " * 100_000
            for method, path, limit in [
                ("POST", "/chat/completions", "4,000"),
                ("POST", "/completions", "4,000"),
                ("POST", "/adaptations", "4,000"),
                ("PUT", "/experts/mine", "5,000"),
            ]:
                content = endless() if chunked else b" " * 100_000
                response = await http.request(
                    method, path, content=content, headers={"content-type": "application/json"}
                )
                assert response.status_code == 413 and limit in response.json()["error"]["message"]
        assert not backend.calls and "mine" not in backend.experts

    asyncio.run(main())


@pytest.mark.parametrize("length", ["99999999999999999999", "-1", "x", "1" * 5000])
def test_a_content_length_that_lies_is_no_fault_of_the_server(length: str) -> None:
    async def main() -> int:
        sent = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(CHAT | {"n": 99}).encode(), "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        app = create_api(SMALL)
        app.state.backend = FakeBackend()
        headers = {"host": "localhost", "content-type": "application/json", "content-length": length}
        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        await app(scope, receive, send)  # type: ignore[arg-type]
        return int(sent[0]["status"])

    assert asyncio.run(main()) in (400, 413)


def test_a_prompt_that_does_not_fit_the_context_is_the_requests_mistake() -> None:
    async def main() -> None:
        async with served(FakeBackend()) as url, httpx2.AsyncClient(base_url=f"{url}/v1", timeout=GUARD_S) as http:
            text, chat = {"prompt": "a " * 5000}, {"messages": [{"role": "user", "content": "a " * 4090}]}
            for stream in (False, True):
                for path, body, has in (
                    ("completions", text, "5,000 of the prompt and at least 1 of the answer, 5,001 together"),
                    ("completions", text | {"max_tokens": 9}, "5,000 of the prompt and 9 of max_tokens"),
                    ("chat/completions", chat | {"max_tokens": 7}, "4,090 of the messages and 7 of max_tokens"),
                    ("chat/completions", chat | {"max_completion_tokens": 7}, "7 of max_completion_tokens, 4,097"),
                ):
                    response = await http.post(f"/{path}", json=body | {"model": "t2ray:base", "stream": stream})
                    error = response.json()["error"]
                    assert response.status_code == 400 and error["code"] == "context_length_exceeded"
                    assert error["message"].startswith("the maximum context length is 4,096 tokens; ")
                    assert has in error["message"] and error["param"] == next(iter(body))
                    assert ("lower" in error["message"]) == (len(body) > 1)
            whole = await http.post("/chat/completions", json=chat | {"model": "t2ray:base"})
            assert whole.status_code == 200

    asyncio.run(main())


def test_a_key_has_so_many_requests_at_once_and_no_more() -> None:
    async def main(monkey: pytest.MonkeyPatch) -> None:
        monkey.setenv("KEYS", "user:first-key-of-the-test,user:second-key-of-the-test")
        backend = FakeBackend()
        backend.pause_after = 1
        config = ApiConfig(keys_env="KEYS", max_streams=2)
        first, second = ({"authorization": f"Bearer {name}-key-of-the-test"} for name in ("first", "second"))
        async with served(backend, config) as url, httpx2.AsyncClient(base_url=f"{url}/v1", timeout=GUARD_S) as http:
            running = [asyncio.create_task(http.post("/completions", json=TEXT, headers=first)) for _ in range(2)]
            await backend.paused.wait()
            while len(backend.running) < 2:
                await asyncio.sleep(0)
            for path, body in (("/completions", TEXT), ("/chat/completions", CHAT | {"stream": True})):
                busy = await http.post(path, json=body, headers=first)
                assert busy.status_code == 429 and int(busy.headers["retry-after"]) > 0
                assert busy.json()["error"]["code"] == "too_many_requests"
            assert (await http.get("/load", headers=first)).json()["running"] == 2  # what the page reads goes on
            running.append(asyncio.create_task(http.post("/completions", json=TEXT, headers=second)))
            while len(backend.running) < 3:
                await asyncio.sleep(0)
            backend.go.set()
            assert [(await task).status_code for task in running] == [200] * 3
            assert (await http.post("/completions", json=TEXT, headers=first)).status_code == 200

    with pytest.MonkeyPatch.context() as monkey:
        asyncio.run(main(monkey))
