"""The endpoint on a real Ray: what `t2ray serve` starts, asked as users ask it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import yaml
from endpoint import ROOT, Endpoint, body, serving, wait_until
from waiting import GUARD_S

from t2ray.experts.registry import Registry
from t2ray.tasks import tiny
from t2ray.tasks.tiny import gold

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


ENGINES = [
    "transformers",
    pytest.param(
        "vllm",
        marks=[pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM (make vllm)")],
    ),
]


@pytest.fixture(scope="module", params=ENGINES)
def endpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    replicas = 2 if request.param == "transformers" else 1
    autoscaling = {"min_replicas": replicas, "max_replicas": replicas}
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, engine=request.param, autoscaling_config=autoscaling) as started:
        yield started


def test_the_openai_client_is_answered_by_the_fitting_expert(endpoint: Endpoint) -> None:
    client = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none")
    names = {model.id for model in client.models.list()}
    assert {"t2ray", "t2ray:prompt", "t2ray:cls", "t2ray:base", "t2ray:math", "t2ray:fewshot/math_long"} <= names
    for task, expert in (("math", "math"), ("code", "code"), ("pick", "pick")):
        row = tiny.rows(task, "test")[0]
        answer = client.chat.completions.create(
            model="t2ray", temperature=0, messages=[{"role": "user", "content": row["prompt"]}]
        )
        assert answer.choices[0].message.content == gold(row)
        extension: Any = answer.model_extra
        assert extension["t2ray"]["mixture"] == {expert: 1.0} and extension["t2ray"]["probabilities"][expert] > 0.9
    stream = client.chat.completions.create(
        model="t2ray:math", temperature=0, stream=True, messages=[{"role": "user", "content": "17+25"}]
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == "42"
    with pytest.raises(openai.NotFoundError, match="t2ray:math"):
        client.chat.completions.create(model="t2ray:maths", messages=[{"role": "user", "content": "x"}])
    client.close()


def test_later_turns_of_a_conversation_are_dispatched_and_answered_as_first_ones(endpoint: Endpoint) -> None:
    """Each turn is of another kind, and its answer is sent with the next; a mere follow-up keeps the kind before it."""
    turns = [("17+25", "42", "math"), ("add 3 to n", "return n+3", "code"), ("larger? A 17 B 42", "(B)", "pick"),
             ("hello Anna, how are you?", "I am fine, thank you!", "others"), ("48-6", "42", "math"),
             ("and of 7?", None, "math")]  # fmt: skip
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none") as client:
        for model in ("t2ray", "t2ray:prompt"):
            said: list[Any] = []
            for asked, wanted, label in turns:
                said.append({"role": "user", "content": asked})
                answer = client.chat.completions.create(model=model, temperature=0, messages=said)
                extension: Any = answer.model_extra
                text = answer.choices[0].message.content
                assert extension["t2ray"]["label"] == label, (model, said)
                assert wanted in (text, None), (model, said, text)
                said.append({"role": "assistant", "content": text})


def test_requests_of_many_mixtures_share_batches_and_each_is_as_if_alone(endpoint: Endpoint) -> None:
    models = [f"t2ray:{name}" for name in ("math", "code", "pick", "base", "math:0.7,code:0.3", "code:0.5,pick:0.5")]
    prompts = ["17+25", "add 3", "larger? A 31 B 28"]
    alone = [endpoint.chat(p, m).json()["choices"][0]["message"]["content"] for p in prompts for m in models]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="none") as client:
            calls = [
                client.chat.completions.create(model=m, temperature=0, messages=[{"role": "user", "content": p}])
                for p in prompts
                for m in models
            ]
            return [answer.choices[0].message.content or "" for answer in await asyncio.gather(*calls)]

    assert asyncio.run(together()) == alone


def test_a_client_that_disconnects_stops_its_generation(endpoint: Endpoint) -> None:
    before = endpoint.load()["aborted"]
    request = body("17+25", max_tokens=400, ignore_eos=True, stream=True)

    def aborted() -> bool:
        """Asks again where the client was too slow to go before its answer had ended."""
        with httpx.stream("POST", f"{endpoint.url}/v1/chat/completions", json=request, timeout=GUARD_S) as stream:
            next(stream.iter_lines())
        wait_until(lambda: endpoint.load()["running"] == 0, "an engine that generates nothing")
        return endpoint.load()["aborted"] > before

    wait_until(aborted, "an aborted generation")
    wait_until(lambda: (load := endpoint.load())["running"] == 0 == load["tokens_per_s"], "an idle engine")


def test_experts_come_change_and_go_on_all_replicas_without_a_failed_request(endpoint: Endpoint) -> None:
    """Two replicas share the load; a request to the new expert must be answered the same by both."""
    math = (endpoint.registry / "math" / "v0001" / "expert.safetensors").read_bytes()
    code = (endpoint.registry / "code" / "v0001" / "expert.safetensors").read_bytes()
    failed: list[str] = []
    stop = threading.Event()

    def keep_asking() -> None:
        with httpx.Client(timeout=GUARD_S) as client:
            while not stop.is_set():
                reply = client.post(f"{endpoint.url}/v1/chat/completions", json=body("17+25"))
                if reply.status_code != 200 or reply.json()["choices"][0]["message"]["content"] != "42":
                    failed.append(reply.text)

    askers = [threading.Thread(target=keep_asking) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        put = httpx.put(f"{endpoint.url}/v1/experts/fresh", content=math, timeout=GUARD_S)
        assert put.json() == {"name": "fresh", "version": 1}
        assert [endpoint.chat("17+25", "t2ray:fresh").json()["choices"][0]["message"]["content"] for _ in range(8)] == [
            "42"
        ] * 8
        assert httpx.put(f"{endpoint.url}/v1/experts/fresh", content=code, timeout=GUARD_S).json()["version"] == 2
        expected = endpoint.chat("add 3", "t2ray:code").json()["choices"][0]["message"]["content"]

        def everywhere() -> bool:
            replies = [endpoint.chat("add 3", "t2ray:fresh").json() for _ in range(8)]
            return [reply["choices"][0]["message"]["content"] for reply in replies] == [expected] * 8

        wait_until(everywhere, "the new version on both replicas")
        Registry(endpoint.registry).delete("fresh")  # behind the API's back
        wait_until(lambda: endpoint.chat("17+25", "t2ray:fresh").status_code == 404, "a 404 for what is gone")
    finally:
        stop.set()
        for asker in askers:
            asker.join()
    assert not failed


def test_a_corrupt_expert_is_unavailable_by_name_and_the_others_serve(endpoint: Endpoint) -> None:
    registry = Registry(endpoint.registry)
    expert = registry.load("math")
    registry.save("corrupt", expert.z, base_digest=expert.manifest.base_digest)
    wait_until(lambda: endpoint.chat("17+25", "t2ray:corrupt").status_code == 200, "a new expert")
    (endpoint.registry / "corrupt" / "v0001" / "expert.safetensors").write_bytes(b"\xff" * 4000)
    told = lambda: httpx.get(f"{endpoint.url}/v1/experts/corrupt", timeout=GUARD_S).json()  # noqa: E731
    wait_until(lambda: "damaged" in (told().get("problem") or ""), "a word of it")
    # From here on the ingress itself refuses. Before, it may not know the expert, or ask a replica that has not looked.
    refused = endpoint.chat("17+25", "t2ray:corrupt")
    assert refused.status_code == 503 and "corrupt" in refused.json()["error"]["message"]
    assert endpoint.chat("17+25").json()["choices"][0]["message"]["content"] == "42"
    registry.delete("corrupt")


def test_a_search_in_the_background_makes_a_mixture_that_can_be_asked_for_at_once(endpoint: Endpoint) -> None:
    rows = tiny.rows("math_long", "train")[:6]
    search = httpx.post(
        f"{endpoint.url}/v1/adaptations",
        json={
            "name": "found",
            "verifier": "equal",
            "examples": [{"prompt": row["prompt"], "answer": gold(row)} for row in rows],
            "settings": {"iterations": 2, "population": 6},
            "max_tokens": 16,
        },
        timeout=GUARD_S,
    )
    assert search.status_code == 202, search.text
    url = f"{endpoint.url}/v1/adaptations/{search.json()['id']}"
    wait_until(lambda: httpx.get(url, timeout=GUARD_S).json()["status"] != "running", "an outcome")
    outcome = httpx.get(url, timeout=GUARD_S).json()
    assert outcome["status"] == "succeeded" and outcome["accuracy"] > 0.5 and outcome["progress"] == 1.0
    answer = endpoint.chat(rows[0]["prompt"], outcome["model"])
    assert answer.json()["t2ray"]["mixture"] == outcome["mixture"]
    assert httpx.get(f"{endpoint.url}/v1/adaptations/none", timeout=GUARD_S).status_code == 404


def test_health_metrics_and_the_page(endpoint: Endpoint) -> None:
    assert httpx.get(f"{endpoint.url}/health", timeout=GUARD_S).json() == {"status": "ok"}
    page = httpx.get(endpoint.url, headers={"x-request-id": "<odd>"}, timeout=GUARD_S)
    assert "<title>" in page.text
    (given,) = page.headers.get_list("x-request-id")  # by Ray's proxy and by the API together
    assert len(given) == 32

    def told() -> bool:
        text = httpx.get(f"{endpoint.url}/metrics", timeout=GUARD_S).text
        assert "ray_serve" not in text
        wanted = ["vllm:generation_tokens_total"]
        wanted += [f"ray_t2ray_{name}" for name in ("requests_total", "ttft_seconds", "batch_mixtures", "kv_used")]
        return all(name in text for name in wanted)

    wait_until(told, "metrics of the API and of the engine")


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["applications"][0]["args"].update(modle="x"), "modle"),
        (lambda d: d["applications"][0]["args"].update(model="/nowhere"), "/nowhere"),
        (lambda d: d["http_options"].update(host="0.0.0.0"), "t2ray keys"),
        (lambda d: d["applications"][0]["deployments"][0].update(max_ongoing_request=1), "max_ongoing_request"),
        (lambda d: d.update(applications=[]), "exactly one"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_line(tmp_path: Path, change: Any, said: str) -> None:
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    change(document)
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(document))
    command = [str(Path(sys.executable).with_name("t2ray")), "serve", "--config", str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=GUARD_S)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
