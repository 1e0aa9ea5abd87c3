"""The API as OpenAI's own client and a browser meet it: real HTTP, a fake model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from fake_backend import FakeBackend, served
from safetensors.numpy import save
from waiting import GUARD_S

from t2ray.api.app import create_api
from t2ray.api.names import names
from t2ray.api.replies import model_reply
from t2ray.config.serve import ApiConfig
from t2ray.core import Busy, ConfigError, GenerationError, Mixture, ResourceError, UnknownExpert

ASK = [{"role": "user", "content": "what is 17+25"}]
Work = Callable[[openai.AsyncOpenAI, FakeBackend], Coroutine[Any, Any, None]]


def with_client(work: Work, backend: FakeBackend | None = None, config: ApiConfig | None = None) -> FakeBackend:
    """Runs `work` with OpenAI's client against a served backend; the backend."""

    async def main(backend: FakeBackend) -> None:
        async with (
            served(backend, config) as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=GUARD_S) as client,
        ):
            async with asyncio.timeout(GUARD_S):
                await work(client, backend)

    backend = backend or FakeBackend()
    asyncio.run(main(backend))
    return backend


def of(response: Any) -> dict[str, Any]:
    """The extension of an answer."""
    extension: dict[str, Any] = response.model_extra["t2ray"]
    return extension


def test_the_synchronous_client_gets_an_answer_with_its_experts() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        def ask() -> Any:
            with openai.OpenAI(base_url=str(client.base_url), api_key="none") as sync:
                return sync.chat.completions.create(model="t2ray", messages=ASK, max_tokens=5)

        answer = await asyncio.to_thread(ask)
        assert answer.choices[0].message.content == "math:1 answers what is 17+25"
        assert answer.choices[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)
        extension = of(answer)
        assert extension["mixture"] == {"math": 1.0}
        assert (extension["strategy"], extension["label"], extension["versions"]) == ("cls", "math", {"math": 3})
        assert sum(extension["probabilities"].values()) == pytest.approx(1)
        assert extension["pass1_ms"] == 4.0 and extension["pass2_ms"] > 0 and extension["cached"] is False

    with_client(work)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_adds_up_to_the_whole_answer(n: int) -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        asked: dict[str, Any] = {"model": "t2ray", "messages": ASK, "n": n, "seed": 5, "logprobs": True}
        whole = await client.chat.completions.create(**asked)
        stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        *chunks, last = [chunk async for chunk in stream]
        assert last.choices == [] and last.usage == whole.usage
        assert all(chunk.usage is None for chunk in chunks)
        assert len({chunk.id for chunk in chunks}) == 1
        for choice in whole.choices:
            pieces = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
            assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
            assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [choice.finish_reason]
            assert [piece.delta.role for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
            logprobs = [token for piece in pieces for token in piece.logprobs.content]
            assert logprobs == choice.logprobs.content

        ends = [chunk for chunk in chunks if chunk.choices[0].finish_reason]
        extended = [chunk for chunk in chunks if "t2ray" in (chunk.model_extra or {})]
        assert extended == [chunks[0], *ends]
        assert of(chunks[0]) | {"pass2_ms": 0} == of(ends[-1]) | {"pass2_ms": 0}
        assert of(chunks[0])["pass2_ms"] is None and of(ends[-1])["pass2_ms"] > 0
        assert len({choice.message.content for choice in whole.choices}) == n

    with_client(work)


def test_the_numbers_of_tokens_so_far_come_with_every_chunk_when_asked_for() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        options: Any = {"include_usage": True, "continuous_usage_stats": True}
        stream = await client.chat.completions.create(
            model="t2ray:base", messages=ASK, max_tokens=4, stream=True, stream_options=options
        )
        used = [chunk.usage async for chunk in stream]
        counts = [usage.completion_tokens for usage in used if usage]
        assert len(counts) == len(used) and counts == sorted(counts) and counts[-1] == 4
        assert {usage.prompt_tokens for usage in used if usage} == {3}

    with_client(work)


def test_completions_continue_every_prompt_with_its_own_mixture() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        asked: dict[str, Any] = {"model": "t2ray", "prompt": ["17+25", "hello"], "n": 2, "seed": 3, "logprobs": 2}
        whole = await client.completions.create(**asked, max_tokens=6)
        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
        assert [choice.text.split()[0] for choice in whole.choices] == ["math:1", "math:1", "base", "base"]
        assert [choice.model_extra["t2ray"]["label"] for choice in whole.choices] == ["math"] * 2 + ["others"] * 2
        assert of(whole) == whole.choices[0].model_extra["t2ray"]
        assert whole.usage.prompt_tokens == 2 and whole.usage.completion_tokens == 24
        first = whole.choices[0].logprobs
        assert "".join(first.tokens) == whole.choices[0].text
        for offset, token in zip(first.text_offset, first.tokens, strict=True):
            assert whole.choices[0].text[offset:].startswith(token)
        assert [len(top) for top in first.top_logprobs] == [2] * 6

        stream = await client.completions.create(**asked, max_tokens=6, stream=True)
        pieces = [piece async for chunk in stream for piece in [chunk.choices[0]]]
        for choice in whole.choices:
            own = [piece for piece in pieces if piece.index == choice.index]
            assert "".join(piece.text for piece in own) == choice.text
            assert [o for piece in own for o in piece.logprobs.text_offset] == choice.logprobs.text_offset

    backend = with_client(work)
    assert [prompt for prompt, _, _ in backend.calls[:4]] == ["17+25", "17+25", "hello", "hello"]
    assert [sampling.seed for _, _, sampling in backend.calls[:4]] == [3, 4, 3, 4]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_comes_with_its_own_log_probabilities_by_the_mixture(stream: bool) -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        async def ask(**more: Any) -> list[dict[str, Any]]:
            """The choices, put together from their pieces."""
            asked: dict[str, Any] = {"model": "t2ray:math:0.7,code:0.3", "echo": True, "stream": stream}
            got: Any = await client.completions.create(**asked | more)
            pieces = [piece async for chunk in got for piece in chunk.choices] if stream else got.choices
            whole: dict[int, dict[str, Any]] = {}
            for piece in pieces:
                row = whole.setdefault(piece.index, {"text": "", "columns": {}})
                row["text"] += piece.text
                for name, values in (piece.logprobs.model_dump() if piece.logprobs else {}).items():
                    row["columns"].setdefault(name, []).extend(values)
            return [whole[i] for i in sorted(whole)]

        (plain,) = await ask(prompt="what is 1+1", max_tokens=2)
        assert plain["text"] == "what is 1+1code:0.3,math:0.7 answers" and not plain["columns"]
        (scored,) = await ask(prompt="what is 1+1", max_tokens=1, logprobs=1)
        columns = scored["columns"]
        assert columns["tokens"] == ["what", " is", " 1+1", "code:0.3,math:0.7"]
        assert columns["token_logprobs"] == [None, -0.5, -0.5, -0.5]
        assert columns["top_logprobs"][:2] == [None, {" is": -0.5}] and columns["text_offset"] == [0, 4, 7, 11]
        assert "".join(columns["tokens"]) == scored["text"]
        many = await ask(prompt=[[0, 1, 2], [3, 4]], max_tokens=0, logprobs=0)
        assert [row["text"] for row in many] == ["abc", "de"]
        assert [len(row["columns"]["tokens"]) for row in many] == [3, 2]
        assert [row["text"][:2] for row in await ask(model="t2ray", prompt=[[0, 1]] * 64, max_tokens=1)] == ["ab"] * 64

    backend = with_client(work)
    assert backend.calls[-1][0] == (0, 1)


def test_what_a_request_says_reaches_the_engine() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        await client.chat.completions.create(
            model="t2ray:math:0.7,code:0.3",
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
                {"role": "user", "content": "d"},
            ],
            max_completion_tokens=7, temperature=0.5, top_p=0.9, seed=-1, stop="with", logprobs=True, top_logprobs=3,
            user="ann", presence_penalty=0, tools=[], response_format={"type": "text"}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        await client.chat.completions.create(
            model="t2ray:base", messages=ASK, presence_penalty=0.5, frequency_penalty=-1,
            logit_bias={"7": 3, "9": -100}, extra_body={"top_k": 40, "min_p": 0.05},
        )  # fmt: skip
        await client.chat.completions.create(model="t2ray:base", messages=ASK)

    backend = with_client(work)
    prompt, mixture, sampling = backend.calls[0]
    assert [(m.role, m.content) for m in prompt] == [
        ("system", "be brief"), ("user", "a b"), ("assistant", "c"), ("user", "d")
    ]  # fmt: skip
    assert mixture == Mixture.of({"math": 0.7, "code": 0.3})
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.5, 0.9)
    assert (sampling.seed, sampling.stop, sampling.top_logprobs, sampling.ignore_eos) == (2**63 - 1, ("with",), 3, True)
    sampling = backend.calls[1][2]
    assert (sampling.top_k, sampling.min_p, sampling.logit_bias) == (40, 0.05, ((7, 3.0), (9, -100.0)))
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1.0)
    _, mixture, sampling = backend.calls[2]
    assert mixture == Mixture.base()
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (1024, 1.0, 1.0, None)
    assert sampling.to_end and not backend.calls[0][2].to_end
    assert not sampling.ignore_eos and not sampling.top_logprobs


NOTHING: dict[str, Any] = {
    "metadata": {"run": "7"}, "user": "ann", "store": True, "safety_identifier": "x", "prompt_cache_key": "y",
    "top_k": -1, "min_p": 0, "repetition_penalty": 1, "length_penalty": 1.0, "top_p": 1, "presence_penalty": 0.0,
    "frequency_penalty": None, "logit_bias": None, "best_of": 1, "min_tokens": 0, "stop_token_ids": [], "seed": None,
    "skip_special_tokens": True, "use_beam_search": False, "guided_json": None, "n": None, "logprobs": None,
    "stop": None, "stream": None, "stream_options": None, "temperature": None, "max_tokens": None, "echo": False,
    "response_format": {"type": "text"},
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_what_means_nothing_changes_nothing(name: str) -> None:
    turn = {"role": "user", "name": "ann", "id": "msg_1", "cache_control": {"type": "ephemeral"}}
    part = {"type": "text", "text": "what is 17+25", "cache_control": {"type": "ephemeral"}}
    both = {"model": "t2ray:base", name: NOTHING[name]}

    async def main(backend: FakeBackend) -> None:
        app = create_api(ApiConfig())
        app.state.backend = backend
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1/v1") as http:
            for body in (both | {"messages": ASK}, both | {"messages": [turn | {"content": [part]}]}):
                answer = await http.post("/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
            answer = await http.post("/completions", json=both | {"prompt": "what is 17+25"})
            assert answer.status_code == 200, answer.text

    backend = FakeBackend()
    asyncio.run(main(backend))
    assert backend.calls[0] == backend.calls[1] and backend.calls[0][1:] == backend.calls[2][1:]


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        answer = await client.chat.completions.create(model="t2ray:math", messages=ASK, stop=["zzz", " is"])
        assert answer.choices[0].message.content == "math:1 answers what"
        assert answer.choices[0].finish_reason == "stop"

    with_client(work)


def test_pass_1_runs_only_where_a_strategy_decides() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.failures["dispatch"] = RuntimeError("pass 1 ran")
        for model, mixture in {
            "t2ray:math": {"math": 1.0},
            "t2ray:math:1": {"math": 1.0},
            "t2ray: math:0.7, code:0.3": {"math": 0.7, "code": 0.3},
            "t2ray:fewshot/sums": {"math": 0.7, "code": 0.2},
            "t2ray:base": {},
        }.items():
            answer = await client.chat.completions.create(model=model, messages=ASK)
            assert of(answer)["mixture"] == mixture
            assert (of(answer)["label"], of(answer)["probabilities"], of(answer)["pass1_ms"]) == (None, {}, 0)
        del backend.failures["dispatch"]
        for model, strategy in {"t2ray": "cls", "t2ray:cls": "cls", "t2ray:prompt": "prompt"}.items():
            answer = await client.chat.completions.create(model=model, messages=ASK)
            assert (of(answer)["strategy"], of(answer)["label"]) == (strategy, "math")

    with_client(work)


def test_every_listed_model_answers_and_can_be_looked_up() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.experts["base"] = backend.experts["math"]  # a strategy's word: reached with a weight
        listed = [model async for model in client.models.list()]
        expected = (
            "t2ray",
            "t2ray:prompt",
            "t2ray:cls",
            "t2ray:base",
            "t2ray:math",
            "t2ray:base:1",
            "t2ray:fewshot/sums",
        )
        assert {model.id for model in listed}.issuperset(expected)
        for model in listed:
            assert await client.models.retrieve(model.id) == model
            answer = await client.chat.completions.create(model=model.id, messages=ASK)
            assert answer.model == model.id
        kinds = {model.id: of(model)["kind"] for model in listed}
        assert kinds["t2ray"] == "strategy" and kinds["t2ray:math"] == "expert" and kinds["t2ray:base"] == "base"
        assert kinds["t2ray:fewshot/sums"] == "mixture"

    with_client(work)


@pytest.mark.parametrize(
    ("model", "status", "said"),
    [
        ("t2ray:mth", 404, "did you mean 't2ray:math'"),
        ("gpt-5", 404, "does not exist"),
        ("t2ray:", 404, "does not exist"),
        ("t2ray:fewshot/sum", 404, "did you mean 't2ray:fewshot/sums'"),
        ("t2ray:math:0.5,cod:0.5", 404, "does not exist"),
        ("t2ray:../../etc/passwd", 404, "does not exist"),
        ("t2ray:math:nan", 400, "finite"),
        ("t2ray:math:1e9", 400, "-16..16"),
        ("t2ray:math:lots", 400, "not a number"),
        ("t2ray:math,math", 400, "twice"),
        ("t2ray:" + "x" * 5000, 400, "4096"),
        ("t2ray:broken", 503, "'broken' cannot be used: shape"),
        ("t2ray:math,broken:0.1", 503, "'broken' cannot be used: shape"),
    ],
)
def test_a_model_name_that_is_wrong_is_refused_in_openais_shape(model: str, status: int, said: str) -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        with pytest.raises(openai.APIStatusError) as refused:
            await client.chat.completions.create(model=model, messages=ASK)
        assert refused.value.status_code == status
        body: Any = refused.value.body
        assert said in body["message"] and set(body) == {"message", "type", "param", "code"}
        assert body["param"] == "model"
        assert len(body["message"]) < 1000

    backend = FakeBackend()
    backend.experts["broken"] = model_with_a_problem(backend)
    with_client(work, backend)
    assert not backend.calls


def model_with_a_problem(backend: FakeBackend) -> Any:
    from dataclasses import replace

    return replace(backend.experts["math"], name="broken", problem="shape (3,), not (4,)")


def test_a_broken_expert_is_shown_and_the_others_serve() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        assert of(await client.models.retrieve("t2ray:broken"))["problem"] == "expert 'broken': shape (3,), not (4,)"
        assert (await client.chat.completions.create(model="t2ray", messages=ASK)).choices
        expert = await client.get("/experts/broken", cast_to=object)
        assert expert["problem"] and expert["heat"] is None
        backend.mixtures["old"] = Mixture.of({"gone": 1.0})
        assert of(await client.models.retrieve("t2ray:fewshot/old"))["problem"] == "there is no expert 'gone'"

    backend = FakeBackend()
    backend.experts["broken"] = model_with_a_problem(backend)
    with_client(work, backend)


def test_a_name_among_a_thousand_experts_is_refused_in_a_few_lines() -> None:
    backend = FakeBackend()
    backend.experts |= {f"expert{i}": backend.experts["math"] for i in range(1000)}
    catalog = backend.catalog()
    assert len(list(names(catalog))) > 1000

    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        with pytest.raises(openai.NotFoundError) as refused:
            await client.models.retrieve("t2ray:expert1000")
        assert "more)" in refused.value.message and len(refused.value.message) < 1500

    with_client(work, backend)
    assert model_reply("t2ray:expert7", catalog).t2ray.kind == "expert"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnknownExpert("gone"), 404),
        (ConfigError("too long"), 400),
        (Busy("full"), 429),
        (ResourceError("no replica"), 503),
        (GenerationError("overflow"), 503),
        (RuntimeError("a secret of the server's"), 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["dispatch", "stream"])
def test_an_error_before_the_first_token_is_a_status(error: Exception, status: int, stream: bool, where: str) -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        with pytest.raises(openai.APIStatusError) as refused:
            await client.chat.completions.create(model="t2ray", messages=ASK, stream=stream)
        assert refused.value.status_code == status
        assert ("retry-after" in refused.value.response.headers) == (status in (429, 503))
        assert refused.value.response.headers["x-request-id"]
        assert "nosniff" in refused.value.response.headers["x-content-type-options"]
        assert (str(error) in refused.value.message) == (status != 500)

    backend = FakeBackend()
    backend.failures[where] = error
    with_client(work, backend)
    assert ("errors_total", 1, {"kind": type(error).__name__}) in backend.observed


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_alone_can_refuse_names_the_parameter_of_the_prompt(stream: bool) -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.failures["stream"] = ConfigError("the model's chat template refuses this conversation (user): no")
        asked: dict[str, Any] = {"model": "t2ray:base", "stream": stream}
        with pytest.raises(openai.BadRequestError, match="refuses this conversation") as refused:
            await client.chat.completions.create(**asked, messages=ASK)
        assert refused.value.param == "messages"
        with pytest.raises(openai.BadRequestError) as refused:
            await client.completions.create(**asked, prompt="x")
        assert refused.value.param == "prompt"

    with_client(work)


def test_experts_are_uploaded_looked_at_and_deleted() -> None:
    async def main() -> None:
        async with served(FakeBackend()) as url, httpx2.AsyncClient(base_url=f"{url}/v1", timeout=GUARD_S) as http:
            z = save({"layers.0": np.ones(4, np.float32)})
            assert (await http.put("/experts/mine", content=z)).json() == {"name": "mine", "version": 1}
            assert (await http.put("/experts/mine", content=z)).json() == {"name": "mine", "version": 2}
            listed = {row["name"]: row for row in (await http.get("/experts")).json()["data"]}
            assert listed["mine"]["version"] == 2 and listed["dispatch"]["classifies"]
            one = (await http.get("/experts/mine")).json()
            heat = one.pop("heat")
            assert one == listed["mine"]
            assert np.shape(heat["values"]) == (len(heat["layers"]), len(heat["kinds"]))
            for bad in (b"", b"no safetensors", z[:-1]):
                refused = await http.put("/experts/mine", content=bad)
                assert refused.status_code == 400 and "safetensors" in refused.json()["error"]["message"]
            assert (await http.put("/experts/My Expert", content=z)).status_code == 400
            assert (await http.put("/experts/..%2f..%2fetc", content=z)).status_code in (400, 404, 405)
            assert (await http.get("/experts/mine")).json()["version"] == 2
            assert (await http.delete("/experts/mine")).json() == {"name": "mine", "deleted": True}
            for gone in (await http.delete("/experts/mine"), await http.get("/experts/mine")):
                assert gone.status_code == 404 and gone.json()["error"]["code"] == "expert_not_found"

    asyncio.run(main())


def test_an_adaptation_ends_as_a_model_that_answers() -> None:
    asked = {
        "name": "tens",
        "verifier": "exact",
        "experts": ["math"],
        "max_tokens": 8,
        "settings": {"population": 4},
        "examples": [
            {"prompt": "10+20", "answer": "30"},
            {"messages": [{"role": "user", "content": "20+20"}], "answer": "40"},
        ],
    }

    async def main(backend: FakeBackend) -> None:
        async with served(backend) as url, httpx2.AsyncClient(base_url=f"{url}/v1", timeout=GUARD_S) as http:
            started = await http.post("/adaptations", json=asked)
            assert started.status_code == 202 and started.json()["status"] == "queued"
            states = [started.json()]
            while states[-1]["status"] != "succeeded":
                states.append((await http.get(f"/adaptations/{states[0]['id']}")).json())
                assert len(states) < 10
            assert [state["model"] for state in states] == [None] * (len(states) - 1) + ["t2ray:fewshot/tens"]
            assert states[-1]["mixture"] == {"math": 0.5, "pick": 0.4}
            body = {"model": states[-1]["model"], "messages": ASK}
            assert (await http.post("/chat/completions", json=body)).json()["t2ray"]["strategy"] == "fewshot"
            for change, status, param in [
                ({"verifier": "exat"}, 400, "verifier"),
                ({"experts": ["mth"]}, 404, "experts"),
                ({"name": "../x"}, 400, "name"),
                ({"examples": []}, 400, "examples"),
                ({"examples": [{"answer": "1"}]}, 400, "examples[0].prompt"),
                ({"examples": asked["examples"] * 200}, 400, "examples"),
                ({"setings": {}}, 400, "setings"),
            ]:
                refused = await http.post("/adaptations", json=asked | change)
                assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)
            assert (await http.get("/adaptations/none")).status_code == 404

    backend = FakeBackend()
    asyncio.run(main(backend))
    [request] = backend.adapted
    assert [(prompt[0].content, answer) for prompt, answer in request.examples] == [("10+20", "30"), ("20+20", "40")]
    assert (request.experts, request.max_tokens, request.settings) == (("math",), 8, {"population": 4})


def test_health_says_whether_a_generation_works() -> None:
    async def main() -> None:
        async with served(None) as url, httpx2.AsyncClient(base_url=url, timeout=GUARD_S) as http:
            for path in ("/health", "/v1/models", "/v1/load", "/metrics"):
                starting = await http.get(path)
                assert starting.status_code == 503 and starting.json()["error"]["code"] == "starting"
                assert starting.headers["retry-after"]
        backend = FakeBackend()
        backend.failures["ready"] = GenerationError("the engine is stuck")
        async with served(backend) as url, httpx2.AsyncClient(base_url=url, timeout=GUARD_S) as http:
            sick = await http.get("/health")
            assert sick.status_code == 503 and "the engine is stuck" in sick.json()["error"]["message"]
            backend.failures.clear()
            while (healthy := await http.get("/health")).status_code != 200:  # an outcome is remembered for a second
                await asyncio.sleep(0.05)
            assert healthy.json() == {"status": "ok"}

    asyncio.run(main())


def test_the_page_is_served_by_exact_names_under_a_strict_policy() -> None:
    async def main() -> None:
        async with served(FakeBackend()) as url, httpx2.AsyncClient(base_url=url, timeout=GUARD_S) as http:
            page = await http.get("/")
            assert page.headers["content-type"] == "text/html; charset=utf-8" and "<html" in page.text
            script = await http.get("/page/app.js")
            assert script.headers["content-type"].startswith("text/javascript")
            for response in (page, script, await http.get("/v1/load"), await http.get("/nowhere")):
                policy = response.headers["content-security-policy"]
                assert "default-src 'none'; script-src 'self'" in policy and "frame-ancestors 'none'" in policy
                assert response.headers["x-content-type-options"] == "nosniff"
                assert response.headers["referrer-policy"] == "no-referrer"
                assert not [name for name in response.headers if name.startswith("access-control")]
            for name in ("..%2fapi%2fapp.py", "%2e%2e/core.py", "none.js", "__init__.py", "%00", "%2e%2e"):
                assert (await http.get(f"/page/{name}")).status_code == 404
            assert (await http.get("/docs")).status_code == 404 == (await http.get("/redoc")).status_code
            unknown = (await http.get("/v2/models")).json()["error"]
            assert unknown["code"] == "unknown_path" and "/v2/models" in unknown["message"]
            for path in ("/v1/embeddings", "/v1/audio/speech", "/v1/moderations"):
                none = await http.post(path, json={})
                assert none.status_code == 404 and set(none.json()["error"]) == {"message", "type", "param", "code"}
            assert (await http.get("/v1/models/")).json() == (await http.get("/v1/models")).json()
            several = await http.patch("/v1/experts/math")
            assert several.headers["allow"] == "DELETE, GET, HEAD, PUT"
            wrong = await http.delete("/v1/models")
            assert wrong.status_code == 405 and wrong.headers["allow"] and wrong.json()["error"]["code"]

    asyncio.run(main())


def test_other_origins_are_let_in_only_where_they_are_configured() -> None:
    origin = "https://app.example"
    ask = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}

    ask["access-control-request-headers"] += ",x-stainless-lang,x-stainless-retry-count,x-stainless-timeout"

    async def allowed(config: ApiConfig, origin: str) -> tuple[str | None, str | None]:
        async with served(FakeBackend(), config) as url, httpx2.AsyncClient(base_url=url, timeout=GUARD_S) as http:
            preflight = await http.options("/v1/chat/completions", headers=ask | {"origin": origin})
            answer = await http.get("/v1/models", headers={"origin": origin})
        assert "x-stainless-lang" in preflight.headers.get("access-control-allow-headers", "x-stainless-lang")
        assert preflight.status_code in (200, 405) or "evil" in origin
        name = "access-control-allow-origin"
        return preflight.headers.get(name), answer.headers.get(name)

    open_to_one = ApiConfig(cors_origins=(origin,))
    assert asyncio.run(allowed(ApiConfig(), origin)) == (None, None)
    assert asyncio.run(allowed(open_to_one, origin)) == (origin, origin)
    assert asyncio.run(allowed(open_to_one, "https://evil.example")) == (None, None)


def test_every_request_is_a_line_in_the_log_and_a_metric(caplog: pytest.LogCaptureFixture) -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        ask: dict[str, Any] = {
            "model": "t2ray",
            "messages": [{"role": "user", "content": "a secret 1+1"}],
            "max_tokens": 5,
        }
        own = {"x-request-id": "my-id.7"}
        raw = await client.chat.completions.with_raw_response.create(**ask, extra_headers=own)
        assert raw.headers["x-request-id"] == "my-id.7"
        for bad in ("a b", "x" * 200, "<script>"):
            raw = await client.models.with_raw_response.list(extra_headers={"x-request-id": bad})
            assert len(raw.headers["x-request-id"]) == 32
        async for _ in await client.chat.completions.create(**ask, stream=True):
            pass

    caplog.set_level("INFO", logger="t2ray.api")
    backend = with_client(work)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "t2ray.api"]
    assert [line["route"] for line in lines] == ["/v1/chat/completions"] + ["/v1/models"] * 3 + ["/v1/chat/completions"]
    first, last = lines[0], lines[-1]
    assert (first["request_id"], first["key"], first["status"], first["model"]) == ("my-id.7", "anyone", 200, "t2ray")
    assert (first["prompt_tokens"], first["completion_tokens"], last["completion_tokens"]) == (3, 5, 5)
    assert first["ttft"] is None and 0 < last["ttft"] <= last["seconds"]
    assert "secret" not in caplog.text

    observed = [(name, tags) for name, _, tags in backend.observed]
    assert observed.count(("requests_total", {"route": "/v1/chat/completions", "status": "200"})) == 2
    assert observed.count(("routes_total", {"expert": "math"})) == 2
    assert observed.count(("pass1_seconds", {"strategy": "cls"})) == 2
    assert observed.count(("ttft_seconds", {})) == 1 and observed.count(("time_per_token_seconds", {})) == 2
    assert all(0 <= value < 1 for name, value, _ in backend.observed if name == "overhead_seconds")
    assert observed.count(("overhead_seconds", {})) == 2


def test_prompts_and_answers_are_logged_only_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        for stream in (False, True):
            got = await client.completions.create(model="t2ray", prompt="a secret", max_tokens=3, stream=stream)
            if stream:
                assert [chunk async for chunk in got]

    caplog.set_level("INFO", logger="t2ray.api")
    with_client(work, config=ApiConfig(log_prompts=True))
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "t2ray.api"]
    assert [line["prompts"] for line in lines] == [["a secret"]] * 2
    assert [line["answers"] for line in lines] == [["base answers a"]] * 2


def test_load_and_metrics_come_from_the_backend() -> None:
    async def main() -> None:
        async with served(FakeBackend()) as url, httpx2.AsyncClient(base_url=url, timeout=GUARD_S) as http:
            load = (await http.get("/v1/load")).json()
            assert {"replicas", "running", "waiting", "tokens_per_s", "requests", "kv_used"} <= set(load)
            metrics = await http.get("/metrics")
            assert metrics.headers["content-type"].startswith("text/plain")
            assert "t2ray_requests_total 1" in metrics.text

    asyncio.run(main())
