"""Real faults of a real endpoint: processes killed and stopped under load, more load than it takes, a registry that is
gone or damaged, and the end of the endpoint itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from endpoint import Endpoint, body, serving, wait_until
from safetensors.torch import save
from waiting import GUARD_S, family, lives

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.slow]

GENERATOR = {
    "max_ongoing_requests": 12,
    "max_queued_requests": 24,  # 16 clients, and those who ask for the catalog
    "health_check_period_s": 1,
    "health_check_timeout_s": 3,
    "autoscaling_config": {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 6,
        "upscale_delay_s": 1,
        "downscale_delay_s": 4,
        "look_back_period_s": 2,
    },
}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with serving(tmp_path_factory.mktemp("faults"), **GENERATOR) as started:
        yield started


@pytest.fixture
def ray_logs(endpoint: Endpoint) -> Callable[[], str]:
    """What Serve has logged since the test began, of all replicas of this endpoint."""
    assert endpoint.process is not None
    words = [word for process in family(endpoint.process.pid) for word in process.cmdline()]
    session = next(word.split("=")[-1] for word in words if word.startswith("--session-dir="))
    files = lambda: sorted(Path(session).glob("logs/serve/replica_*"))  # noqa: E731
    before = {path: path.stat().st_size for path in files()}
    return lambda: "".join(path.read_text()[before.get(path, 0) :] for path in files())


@pytest.fixture(autouse=True)
def healthy(request: pytest.FixtureRequest) -> None:
    """Each test begins with an endpoint that has recovered from the one before."""
    if "endpoint" not in request.fixturenames:
        return
    endpoint = request.getfixturevalue("endpoint")
    wait_until(lambda: endpoint.chat("17+25").status_code == 200, "a healthy endpoint")
    wait_until(lambda: endpoint.load()["running"] == 0, "an idle endpoint")


class Clients:
    """So many clients that ask one request after the other, until they are told to stop."""

    def __init__(self, endpoint: Endpoint, count: int, **request: object) -> None:
        self.statuses: Counter[int | str] = Counter()
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(endpoint, request)) for _ in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, endpoint: Endpoint, request: dict[str, object]) -> None:
        with httpx.Client(timeout=GUARD_S) as client:
            while not self._stop.is_set():
                reply = client.post(f"{endpoint.url}/v1/chat/completions", json=body("17+25", **request))
                self.statuses[reply.status_code] += 1
                if reply.status_code == 429:
                    assert int(reply.headers["retry-after"]) > 0
                    time.sleep(0.2)
                    continue
                if reply.status_code != 200 or not reply.json()["choices"][0]["message"]["content"].startswith("42"):
                    self.wrong.append(reply.text)


def killed(endpoint: Endpoint, deployment: str) -> int:
    """Kills a replica; returns its pid."""
    pid = endpoint.replicas(deployment)[0]
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_generator_that_is_killed_under_load_costs_no_request(endpoint: Endpoint) -> None:
    with Clients(endpoint, 16, max_tokens=32, ignore_eos=True) as clients:
        wait_until(lambda: clients.statuses[200] > 16, "some answers")
        killed(endpoint, "Generator")
        before = clients.statuses[200]
        wait_until(lambda: clients.statuses[200] > before + 32, "answers after the kill")
    assert not clients.wrong and set(clients.statuses) == {200}, (clients.statuses, clients.wrong[:3])


def test_a_stream_whose_generator_is_killed_ends_with_an_error_in_openai_s_shape(endpoint: Endpoint) -> None:
    request = body("17+25", max_tokens=440, ignore_eos=True, stream=True)
    errors: list[dict[str, object]] = []

    def broken() -> bool:
        """Whether the stream broke: it may have ended before the kill."""
        generators = endpoint.replicas("Generator")
        with httpx.stream("POST", f"{endpoint.url}/v1/chat/completions", json=request, timeout=GUARD_S) as stream:
            lines = stream.iter_lines()
            next(lines)
            for pid in generators:
                os.kill(pid, signal.SIGKILL)
            rest = [line for line in lines if line.startswith("data: ")]
        events = [json.loads(line.removeprefix("data: ")) for line in rest if line != "data: [DONE]"]
        errors.extend(event["error"] for event in events[-1:] if "error" in event)
        return bool(errors)

    wait_until(broken, "a stream whose generator dies")
    assert {"message", "type", "param", "code"} <= set(errors[-1])
    assert "died" in str(errors[-1]["message"])


@pytest.mark.parametrize("deployment", ["Dispatcher", "Monitor", "Ingress", "Proxy"])
def test_what_holds_no_model_is_replaced_when_it_is_killed(endpoint: Endpoint, deployment: str) -> None:
    old = killed(endpoint, deployment)
    wait_until(lambda: endpoint.replicas(deployment) not in ([], [old]), "a new process")
    wait_until(lambda: endpoint.chat("17+25", "t2ray").status_code == 200, "a dispatched answer")


def test_a_generator_that_stalls_is_replaced_by_its_health_check(endpoint: Endpoint) -> None:
    stalled = endpoint.replicas("Generator")
    for pid in stalled:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: set(endpoint.replicas("Generator")) - set(stalled), "another replica")
    wait_until(lambda: endpoint.chat("17+25").status_code == 200, "an answer")


def problems(endpoint: Endpoint) -> dict[str, str]:
    """What `/v1/experts` and `/v1/load` say is wrong in the registry, once they agree."""
    said: list[dict[str, str]] = []

    def agree() -> bool:
        listed = httpx.get(f"{endpoint.url}/v1/experts", timeout=GUARD_S).json()["problems"]
        said.append(listed)
        return bool(endpoint.load()["problems"] == listed)

    wait_until(agree, "one word of both")
    return said[-1]


def test_a_registry_that_is_gone_for_a_while_costs_no_request(endpoint: Endpoint) -> None:
    generators, away = endpoint.replicas("Generator"), endpoint.registry.with_name("away")
    with Clients(endpoint, 2, max_tokens=8) as clients:
        endpoint.registry.rename(away)
        wait_until(lambda: "." in problems(endpoint), "a word of it")
        before = clients.statuses[200]
        wait_until(lambda: clients.statuses[200] > before + 20, "answers without a registry")
        z = (away / "math" / "v0001" / "expert.safetensors").read_bytes()
        assert httpx.put(f"{endpoint.url}/v1/experts/lost", content=z, timeout=GUARD_S).status_code == 503
        assert not endpoint.registry.exists()  # a new one in its place would hide the experts
        away.rename(endpoint.registry)
        wait_until(lambda: not problems(endpoint), "an end of it")
    assert not clients.wrong and set(clients.statuses) == {200}
    assert set(generators) & set(endpoint.replicas("Generator"))


def test_a_damaged_expert_is_refused_by_name_and_the_default_model_serves_all_others(endpoint: Endpoint) -> None:
    generators, math = endpoint.replicas("Generator"), endpoint.registry / "math" / "v0001" / "expert.safetensors"
    whole = math.read_bytes()
    shutil.copytree(endpoint.registry / "code", endpoint.registry / "Code copy")
    (endpoint.registry / "odd" / "v0001" / "manifest.json").mkdir(parents=True)
    math.write_bytes(whole[:200])
    try:
        wait_until(lambda: set(problems(endpoint)) == {"math", "Code copy", "odd"}, "all problems")
        assert httpx.get(f"{endpoint.url}/v1/models", timeout=GUARD_S).status_code == 200
        for model in ("t2ray", "t2ray:cls"):
            code = endpoint.chat("add 3", model)
            assert code.status_code == 200 and code.json()["t2ray"]["mixture"] == {"code": 1.0}, code.text
            refused = endpoint.chat("17+25", model)
            assert refused.status_code == 503 and "expert 'math' cannot be used" in refused.json()["error"]["message"]
    finally:
        math.write_bytes(whole)
        shutil.rmtree(endpoint.registry / "Code copy")
        shutil.rmtree(endpoint.registry / "odd")
    wait_until(lambda: not problems(endpoint) and endpoint.chat("17+25", "t2ray").status_code == 200, "all well again")
    assert set(generators) & set(endpoint.replicas("Generator"))


def test_a_client_s_mistake_leaves_no_traceback_and_no_memory(endpoint: Endpoint, ray_logs: Callable[[], str]) -> None:
    large = save({f"t{i}": torch.ones(1 << 20) for i in range(15)})
    for content in (b"\xff" * 1_000_000, save({"lm_head": torch.ones(3)}), large, large, large):
        refused = httpx.put(f"{endpoint.url}/v1/experts/wrong", content=content, timeout=GUARD_S)
        assert refused.status_code == 400 and "the upload" in refused.json()["error"]["message"], refused.text
    assert endpoint.chat("17 " * 20_000).status_code == 400
    assert httpx.get(f"{endpoint.url}/v1/adaptations/none", timeout=GUARD_S).status_code == 404
    assert "Request failed" not in ray_logs()


def test_overload_is_told_and_passes(endpoint: Endpoint) -> None:
    with Clients(endpoint, 60, max_tokens=48, ignore_eos=True) as clients:
        wait_until(lambda: clients.statuses[429] > 20 and clients.statuses[200] > 60, "refusals and answers")
    assert not clients.wrong and set(clients.statuses) == {200, 429}
    with ThreadPoolExecutor(4) as pool:
        calm = list(pool.map(lambda _: endpoint.chat("17+25").status_code, range(16)))
    assert calm == [200] * 16


def test_replicas_come_with_the_load_and_go_with_it_and_no_request_is_lost(endpoint: Endpoint) -> None:
    replicas: Callable[[], int] = lambda: endpoint.load()["replicas"]  # noqa: E731
    wait_until(lambda: replicas() == 1, "one replica")
    with Clients(endpoint, 12, max_tokens=64, ignore_eos=True) as clients:
        wait_until(lambda: replicas() == 2, "a second replica")
    with Clients(endpoint, 1, max_tokens=32, ignore_eos=True) as trickle:
        wait_until(lambda: replicas() == 1, "one replica again")
    assert not clients.wrong and not trickle.wrong
    assert set(trickle.statuses) == {200} and set(clients.statuses) <= {200, 429}


# ------------------------------------------------------------------------------------------------------------- the end


class Reader(threading.Thread):
    """Reads a long stream to its end: `lines`, and `broken` where the connection broke."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self.url, self.lines, self.broken = endpoint.url, list[str](), False
        self.start()
        wait_until(lambda: len(self.lines) > 2, "a stream that has begun")

    def run(self) -> None:
        request = body("17+25", max_tokens=440, ignore_eos=True, stream=True)
        try:
            with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=request, timeout=GUARD_S) as stream:
                self.lines.extend(line for line in stream.iter_lines() if line)
        except httpx.HTTPError:
            self.broken = True

    @property
    def last(self) -> dict[str, Any]:
        """The last event but `[DONE]`."""
        self.join()
        event: dict[str, Any] = json.loads([line for line in self.lines if "[DONE]" not in line][-1][6:])
        return event


def test_a_signal_lets_running_answers_end_and_refuses_new_ones(tmp_path: Path) -> None:
    with serving(tmp_path) as endpoint:
        assert endpoint.process is not None
        stream = Reader(endpoint)
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(endpoint.chat, "17+25", max_tokens=440, ignore_eos=True)
            wait_until(lambda: endpoint.load()["running"] == 2, "two answers in the making")
            endpoint.process.send_signal(signal.SIGTERM)
            wait_until(lambda: endpoint.chat("17+25").status_code == 503, "a refusal")
            refused = httpx.get(f"{endpoint.url}/health", timeout=GUARD_S)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert whole.result().json()["choices"][0]["finish_reason"] == "length"
        assert stream.last["choices"][0]["finish_reason"] == "length"
        assert stream.lines[-1] == "data: [DONE]" and not stream.broken
        assert endpoint.process.wait(GUARD_S) == 0
    assert "all answers have ended" in (tmp_path / "serve.log").read_text()


@pytest.mark.nodes  # a minute
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain", str(10 * GUARD_S)) as endpoint:
        assert endpoint.process is not None
        generators = endpoint.replicas("Generator")
        stream = Reader(endpoint)
        for generator in generators:  # so that the answer would never end
            os.kill(generator, signal.SIGSTOP)
        endpoint.process.send_signal(signal.SIGINT)
        wait_until(lambda: "a second signal" in (tmp_path / "serve.log").read_text(), "a beginning of the end")
        endpoint.process.send_signal(signal.SIGINT)
        assert endpoint.process.wait(GUARD_S) == 0
        stream.join()
        assert "data: [DONE]" not in stream.lines


@pytest.mark.parametrize(
    ("victim", "said"),
    [
        ("/raylet/raylet", "the raylet of this machine"),
        pytest.param("/gcs_server", "the head of the Ray cluster", marks=pytest.mark.nodes),  # Ray needs a minute
    ],
)
def test_the_command_ends_when_its_ray_has_died(victim: str, said: str, tmp_path: Path) -> None:
    with serving(tmp_path) as endpoint:
        assert endpoint.process is not None
        all_of_it = family(endpoint.process.pid)
        [process] = [process for process in all_of_it if process.cmdline()[:1] and victim in process.cmdline()[0]]
        process.kill()
        assert endpoint.process.wait(GUARD_S) == 2
        wait_until(lambda: not any(map(lives, all_of_it)), "an end of all that it started")
    assert f"t2ray: {said}" in (tmp_path / "serve.log").read_text()


@pytest.mark.nodes
def test_a_start_without_a_registry_waits_for_it_and_what_runs_at_the_limit_of_the_end_ends_with_an_error(
    tmp_path: Path,
) -> None:
    away, log = tmp_path / "away", tmp_path / "serve.log"

    def bring_back() -> None:
        wait_until(lambda: log.exists() and "waiting for the registry of experts" in log.read_text(), "a word of it")
        away.rename(tmp_path / "experts")

    back = threading.Thread(target=bring_back)
    away_first = lambda: ((tmp_path / "experts").rename(away), back.start())  # noqa: E731
    with serving(tmp_path, "--drain", "0", before=away_first) as endpoint:
        back.join()
        assert endpoint.process is not None
        stream = Reader(endpoint)
        endpoint.process.send_signal(signal.SIGTERM)
        assert "the endpoint has ended" in stream.last["error"]["message"] and not stream.broken
        assert endpoint.process.wait(GUARD_S) == 0
