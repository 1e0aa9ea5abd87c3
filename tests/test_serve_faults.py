"""Real faults of a real endpoint: processes killed and stopped under load, more load than it takes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest
from endpoint import Endpoint, body, serving, wait_until
from waiting import GUARD_S

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


@pytest.fixture(autouse=True)
def healthy(endpoint: Endpoint) -> None:
    """Each test begins with an endpoint that has recovered from the one before."""
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
