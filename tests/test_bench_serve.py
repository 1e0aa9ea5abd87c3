"""The benches of serving: the generator's arithmetic and its soak on the API with a fake model, the engine's benches
small, and (with a real endpoint) every figure. No speed is asserted."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_backend import FakeBackend, served
from safetensors.torch import save
from waiting import GUARD_S

from benchmarks.__main__ import main as benchmarks
from benchmarks.core import suite
from benchmarks.endpoint import many, processes, serving, soak
from benchmarks.endpoint.alone import Size, Unfolded, by_round, started
from benchmarks.endpoint.serving import move
from benchmarks.endpoint.soak import Soak, growth, least_squares
from benchmarks.harness import Measure
from t2ray.adapters.factors import decompose
from t2ray.adapters.svf import SVF
from t2ray.cli.main import main
from t2ray.core import Busy, ConfigError, GenerationError, ResourceError
from t2ray.evals import load
from t2ray.evals.load import Client, Outcome, chat, closed_loop, open_loop, percentile, summary
from t2ray.experts.registry import SHIPPED, Registry


@asynccontextmanager
async def client(backend: FakeBackend) -> AsyncIterator[Client]:
    async with served(backend) as url, Client(url, timeout_s=GUARD_S) as asker:
        yield asker


def run(call: Callable[[], Awaitable[Any]], timeout_s: float = GUARD_S) -> Any:
    return asyncio.run(asyncio.wait_for(call(), timeout_s))


# ----------------------------------------------------------------------------------------------------- load generator


@pytest.mark.parametrize("stream", [False, True])
def test_an_outcome_has_the_answers_tokens_and_extension(stream: bool) -> None:
    async def asked() -> Outcome:
        async with client(FakeBackend()) as asker:
            return await asker.ask(chat("17+25", "t2ray:math", max_tokens=40, stream=stream, ignore_eos=True))

    outcome = run(asked)
    assert outcome.error is None and outcome.status == 200 and outcome.tokens == 40
    assert outcome.extension["mixture"] == {"math": 1.0} and outcome.extension["pass2_ms"] is not None
    assert outcome.due < outcome.end and (outcome.first is not None) == stream
    if outcome.first is not None:
        assert outcome.due < outcome.first <= outcome.end


def test_a_streams_first_event_is_timed_when_it_comes_and_not_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream goes on only once the clock has been read for its first event."""
    backend = FakeBackend()
    backend.pause_after = 1
    readings: list[float] = []

    def clock() -> float:
        readings.append(time.perf_counter())
        if len(readings) == 2:  # the first is for the start
            backend.go.set()
        return readings[-1]

    async def asked() -> Outcome:
        async with client(backend) as asker:
            return await asker.ask(chat("a", "t2ray:base", max_tokens=5, stream=True))

    monkeypatch.setattr(load, "time", SimpleNamespace(perf_counter=clock))
    outcome = run(asked)
    assert [outcome.due, outcome.first, outcome.end] == readings


@pytest.mark.parametrize(
    ("failure", "stream", "status", "said"),
    [
        (Busy("full"), False, 429, "429: full"),
        (Busy("full"), True, 429, "429: full"),
        (GenerationError("it died"), True, 200, "in the stream: it died"),
    ],
)
def test_what_goes_wrong_is_in_the_outcome(failure: Exception, stream: bool, status: int, said: str) -> None:
    async def asked() -> Outcome:
        backend = FakeBackend()
        backend.failures = {"generate": failure, "stream": failure}
        backend.break_after = 2 if status == 200 else None
        async with client(backend) as asker:
            return await asker.ask(chat("a", "t2ray:base", max_tokens=5, stream=stream))

    outcome = run(asked)
    assert (outcome.status, outcome.error) == (status, said)


def test_a_server_that_is_not_there_and_a_stream_that_is_cut_are_errors() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        writer.write(b'data: {"choices": []}\n\n')
        await writer.drain()
        writer.close()

    async def asked() -> tuple[Outcome, Outcome]:
        server = await asyncio.start_server(cut, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with Client(url) as asker:
            half = await asker.ask({})
            server.close()
            await server.wait_closed()
            return half, await asker.ask({})

    half, nothing = run(asked)
    assert half.error == "in the stream: it was cut off" and half.status == 200
    assert nothing.status is None and "ClientConnectorError" in nothing.error
    assert summary([half, nothing])["errors"] == {"broken": 1, "no answer": 1}


def test_an_open_loop_sends_when_due_whatever_is_under_way() -> None:
    """Requests that all wait for the 20th: in a closed loop there would never be a second."""
    sent: list[tuple[int, float]] = []

    async def looped() -> list[int]:
        release = asyncio.Event()

        async def send(number: int, due: float) -> int:
            sent.append((number, due))
            if len(sent) == 20:
                release.set()
            await release.wait()
            return number

        return await open_loop(send, rate=200, seconds=0.2, seed=1)

    results = run(looped)
    assert results == [number for number, _ in sent] == list(range(len(sent))) and 20 <= len(sent) <= 65
    dues = [due for _, due in sent]
    assert dues == sorted(dues) and dues[-1] - dues[0] < 0.2


def test_arrivals_are_a_poisson_process_of_the_rate_and_the_seeds_own() -> None:
    async def dues(seed: int) -> list[float]:
        async def send(number: int, due: float) -> float:
            return due

        return await open_loop(send, rate=4000, seconds=0.5, seed=seed)

    first, again, other = (run(lambda seed=seed: dues(seed)) for seed in (0, 0, 1))
    gaps = [b - a for a, b in zip(first, first[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert 0.9 < 4000 * mean < 1.1 and 0.8 < variance / mean**2 < 1.2  # an exponential's deviation is its mean
    assert [round(b - a, 9) for a, b in zip(again, again[1:], strict=False)] == [round(gap, 9) for gap in gaps]
    assert len(other) != len(first) or other[1] - other[0] != gaps[0]


def test_times_of_an_open_loop_count_from_when_a_request_was_due() -> None:
    """A generator that is held up itself must not make its endpoint look faster."""

    async def asked() -> list[Outcome]:
        async with client(FakeBackend()) as asker:

            async def send(number: int, due: float) -> Outcome:
                if number == 0:
                    time.sleep(0.3)  # the whole process stands still
                return await asker.ask(chat("a", "t2ray:base", max_tokens=1), due=due)

            return await open_loop(send, rate=100, seconds=0.1)

    outcomes = run(asked)
    assert len(outcomes) > 2 and all(outcome.seconds > 0.15 for outcome in outcomes)


def test_a_closed_loop_has_as_many_under_way_as_workers() -> None:
    under_way, most, asked = 0, 0, []

    async def send(number: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        asked.append(number)
        await asyncio.sleep(0)
        under_way -= 1
        return number

    results = run(lambda: closed_loop(send, workers=3, each=4))
    assert most == 3 and sorted(asked) == sorted(results) == list(range(12))


def test_percentiles_and_the_summary_are_those_of_the_answered() -> None:
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.75, 1.0)] == [1.0, 2.0, 2.5, 3.0]
    assert percentile([5.0], 0.99) == 5.0
    good = [
        Outcome(due=float(i), first=i + 0.1, end=i + 0.5, status=200, tokens=5) for i in range(3)
    ] + [Outcome(due=3.0, first=None, end=3.25, status=200, tokens=1)]  # fmt: skip
    bad = Outcome(due=3.5, first=None, end=10.0, status=429, error="429: full")
    report = summary([*good, bad])
    assert (report["requests"], report["answered"], report["errors"]) == (5, 4, {"429": 1})
    assert report["seconds"] == 10.0 and report["tokens_per_s"] == 1.6 and report["requests_per_s"] == 0.4
    assert report["ttft_ms"]["p50"] == pytest.approx(100) and report["tpot_ms"]["p99"] == pytest.approx(100)
    assert report["latency_ms"]["p50"] == pytest.approx(500) and report["first_error"] == "429: full"
    nothing = summary([])
    assert nothing["requests"] == 0 and "latency_ms" not in nothing


# --------------------------------------------------------------------------------------------------------- `t2ray load`


APART = """
import asyncio, os, sys
from dataclasses import replace
from fake_backend import FakeBackend, expert, served

class Following(FakeBackend):
    def catalog(self):
        there = {name: expert(name) for name in os.listdir(sys.argv[1])}
        return replace(super().catalog(), experts=self.experts | there)

async def main():
    async with served(Following()) as url:
        print(url, flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@contextmanager
def apart(registry: Path, **environment: str) -> Iterator[str]:
    """The API over a fake model, in a process of its own, that knows the experts whose folders are in a registry."""
    command = [sys.executable, "-c", APART, str(registry)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdin is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


@pytest.fixture
def url(tmp_path: Path) -> Any:
    """The API over a fake model, in a process of its own, with the key `sesame` for a user."""
    with apart(tmp_path, T2RAY_API_KEYS="user:sesame-sesame-sesame-sesame") as address:
        yield address


def test_load_asks_with_a_key_prints_and_writes(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sesame-sesame-sesame-sesame")
    command = ["load", f"{url}/v1", "--rate", "40", "--seconds", "0.5", "--stream", "--max-tokens", "6"]
    path = tmp_path / "load.json"
    assert main([*command, "--key", "MY_KEY", "--ignore-eos", "--json", str(path)]) == 0
    report, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert report["answered"] == report["requests"] > 5 and report["tokens_each"] == 6
    assert "ttft" in printed and "p99" in printed
    assert main(command) == 1  # without the key
    assert "errors: 401" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["load", "http://127.0.0.1:1", "--rate", "0"], "--rate is 0; it must be above 0"),
        (["load", "127.0.0.1:8000", "--rate", "1"], "'127.0.0.1:8000' is no address of an endpoint"),
        (["load", "http://127.0.0.1:1", "--rate", "1", "--key", "NO_SUCH_KEY"], "--key NO_SUCH_KEY: no such"),
        (["load", "http://127.0.0.1:1"], "required: --rate"),
        (["soak", "--minutes", "-1"], "--minutes is -1; it must be above 0"),
        (["serve", "--json", "nowhere/bench.json"], "there is no folder"),
        (["serve", "rows"], "unrecognized arguments: rows"),
    ],
)
def test_a_mistaken_call_ends_with_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        program = main if arguments[0] == "load" else benchmarks
        assert program(arguments) == 2
    except SystemExit as end:
        assert end.code == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------- soak


def soaked(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, *, seconds: float, left_s: float
) -> tuple[Soak, dict[str, Any]]:
    monkeypatch.setattr(soak, "LEFT_S", left_s)
    monkeypatch.setattr(soak, "SAMPLE_S", 0.05)

    async def go() -> tuple[Soak, dict[str, Any]]:
        async with client(backend) as asker:
            work = Soak(client=asker, upload=save({"a": torch.ones(3)}))
            report = await work.run(rate=40, seconds=seconds, search_s=0.2, root=os.getpid(), tell=lambda line: None)
            return work, report

    done: tuple[Soak, dict[str, Any]] = run(go)
    return done


def test_a_soak_makes_every_kind_of_visit_and_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(soak.KINDS, "expert", 2.0)
    backend = FakeBackend(pace=0.002)
    monkeypatch.setattr(backend, "catalog", lambda: replace(FakeBackend.catalog(backend), verifiers=("equal",)))
    before = set(backend.experts)
    work, report = soaked(backend, monkeypatch, seconds=2.0, left_s=GUARD_S)
    assert report["errors"] == 0, report["error_texts"]
    assert set(report["visits"]) >= {*soak.KINDS, "search"}
    assert not backend.running and backend.aborted and set(backend.experts) == before
    assert {"t2ray", "t2ray:cls", "t2ray:base", "t2ray:fewshot/sums", soak.MIXTURE} <= set(work.models)
    asked = {str(mixture) for _, mixture, _ in backend.calls}
    assert len(asked) >= 4 and any(name.startswith("soak-") for name in asked)
    (own,) = [row for row in report["processes"] if row["pid"] == os.getpid()]
    assert own["mb"] > 50 and own["mb_a_minute"] is not None
    json.dumps(report)


def test_a_soak_reports_what_failed_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend()
    backend.running.add("a request that never ends")
    _, report = soaked(backend, monkeypatch, seconds=1.0, left_s=1.0)
    texts = [text for text, _ in report["error_texts"]]
    assert report["errors"] >= 2
    assert any("search: 400: unknown verifier 'equal'" in text for text in texts)
    assert any("left: 1 s after the last request there still is" in text for text in texts)


def test_growth_is_a_line_by_process_from_the_warm_part_on() -> None:
    assert least_squares([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(2.0)
    times = [float(s) for s in range(0, 601, 10)]
    leaks = [
        (s, int(2**20 * (100 + (50 if s < 100 else 60) + s / 60))) for s in times
    ]  # what it takes at first is not it
    flat = [(s, 2**26) for s in times]
    short = [(s, 2**20) for s in times if 200 <= s < 300]
    rows = growth({(1, "flat"): flat, (2, "leaks"): leaks, (3, "short"): short})
    assert [row["title"] for row in rows][0] == "leaks"
    slopes = {row["title"]: row["mb_a_minute"] for row in rows}
    assert slopes["leaks"] == pytest.approx(1.0, abs=1e-3) and slopes["flat"] == 0.0 and slopes["short"] is None


# ---------------------------------------------------------------------------------------------------- engine, processes


def test_processes_have_titles_and_memory() -> None:
    code = "import sys; held = bytearray(64 << 20); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        found = processes.family(os.getpid())
        assert found[child.pid].startswith("python") and os.getpid() in found
        assert 64 << 20 < (processes.rss(child.pid) or 0) < 128 << 20
        assert 64 << 20 < processes.pss(child.pid) <= (processes.rss(child.pid) or 0) + (1 << 20)
        child.stdin.close()
    assert processes.rss(child.pid) is None


@pytest.mark.parametrize(
    ("cmdline", "title"),
    [
        (b"ray::ServeReplica:t2ray:Generator\0", "ServeReplica:t2ray:Generator"),
        (b"ray::SERVE_REPLICA::t2ray#Generator#x:ServeReplica:t2ray:Generator.run", "ServeReplica:t2ray:Generator"),
        (b"ray::ServeController.listen_for_change", "ServeController"),
        (b"/x/ray/core/src/ray/gcs/gcs_server\0--log_dir=/tmp", "gcs_server"),
        (b"/venv/bin/python\0-u\0/x/ray/_private/log_monitor.py\0--a", "log_monitor"),
        (b"", "?"),
    ],
)  # fmt: skip
def test_a_process_keeps_its_title_whatever_it_does(cmdline: bytes, title: str) -> None:
    assert processes._title(cmdline) == title


@pytest.fixture(scope="module")
def factors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bench") / "factors"
    decompose("tiny", folder)
    return folder


def test_the_engines_benches_give_every_figure_and_one_of_them_never_folds(
    factors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "SHORT", 4)
    monkeypatch.setattr(SVF, "tokens_to_fold", lambda self: 40)
    size = Size(rounds=1, rows=2, each=2, tokens=16, experts=40)
    with asyncio.Runner() as runner, started(factors) as folding, started(factors, Unfolded) as unfolded:
        engines = many.Engines(folding=folding, unfolded=unfolded, runner=runner, size=size)
        spread, fold = many.spread(engines), many.fold(engines)
        assert unfolded.stats.folds == 0 < folding.stats.folds
        assert unfolded.stats.failed == folding.stats.failed == 0
    for figures in (spread, fold):
        assert figures and all(isinstance(figure, Measure) for figure in figures.values())
    assert spread["over_one_2_rows"].as_json()["target"] == 0.95
    alternating, worst = (fold[f"{load}_folds_a_request"].as_json()["value"] for load in ("alternating", "worst"))
    assert alternating < worst  # the threshold is so low here that even the mild load folds now and then


def test_experts_that_are_written_in_bulk_are_held_as_any_other(factors: Path, tmp_path: Path) -> None:
    shelf, registry = tmp_path / "shelf", tmp_path / "experts"
    many.write_experts(shelf, factors, 12)
    registry.mkdir()
    held = many._bytes_by_step(factors, shelf, registry, [3, 6, 12])
    assert len(held) == 4 and min(held) > 2**20
    assert len(list(registry.iterdir())) == 12 and not list(shelf.iterdir())
    assert move(registry, shelf) == move(shelf, registry)


def test_the_endpoints_benches_give_every_figure(
    factors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the API with a fake model that follows a registry: all but the replica is real."""
    monkeypatch.setattr(serving.Endpoint, "replica", lambda self, deployment: os.getpid())
    registry, shelf = tmp_path / "experts", tmp_path / "shelf"
    many.write_experts(shelf, factors, 5)
    registry.mkdir()
    size = Size(rounds=2, single=2, rows=2, each=1, tokens=20, open_s=0.4)
    with asyncio.Runner() as runner, apart(registry) as url, started(factors) as engine:
        engine.set_experts({name: torch.ones(engine.model.adapter.size) for name in ("math", "code", "pick")})
        asker = runner.run(Client(url).__aenter__())
        endpoint = serving.Endpoint(url=url, registry=registry, pid=os.getpid())
        pair = serving.Pair(endpoint=endpoint, client=asker, engine=engine, runner=runner, size=size)
        benches = (serving.added, serving.throughput, serving.first_token)
        figures = {bench.__name__: bench(pair) for bench in benches}
        figures["registered"] = serving.registered(pair, shelf)
        with pytest.raises(ResourceError, match="the endpoint gave 0 tokens of 20: 404"):
            pair.http(("no-such-expert",))
        runner.run(asker.__aexit__(None, None, None))
    written = json.loads(json.dumps(suite.as_json(figures, 1)))
    assert len(list(shelf.iterdir())) == 5 and not list(registry.iterdir())  # as it was
    targets = {(bench, key): row["target"] for bench in figures for key, row in written[bench].items() if row["target"]}
    assert targets == {
        ("added", "added_ms"): 15,
        ("added", "pass1_share"): 0.1,
        **{("throughput", f"{way}_{kind}"): 0.8 for way in ("whole", "stream") for kind in ("mixed", "one")},
        ("registered", "latency_over_few"): 1.05,
        ("registered", "noticed_s"): 5,
    }
    assert (
        written["first_token"]["p99_ms"]["value"] > 0 and written["throughput"]["whole_one_tokens_per_s"]["value"] > 0
    )


def test_another_models_mixtures_are_four_of_its_own_experts(tmp_path: Path, capsys: Any) -> None:
    assert serving.mixtures_of(SHIPPED) == ("code", "math", "pick", "code:0.7,math:0.3")  # and none of `dispatch`
    registry = Registry(tmp_path)
    for name in ("b", "a"):
        with pytest.raises(ConfigError, match=r"name a registry of two or more by --experts"):
            serving.mixtures_of(tmp_path)
        registry.save(name, {"x": torch.ones(1)}, base_digest="0")
    assert serving.mixtures_of(tmp_path) == ("a", "b", "a:0.7,b:0.3", "a:0.3,b:0.7")
    assert benchmarks(["serve", "--model", "tiny"]) == 2
    assert "benchmarks: --model and --experts go together" in capsys.readouterr().err


def test_figures_by_round_are_medians_of_equal_parts() -> None:
    assert by_round([1.0, 3.0, 2.0, 9.0, 8.0, 7.0], 2) == [2.0, 8.0]


@pytest.mark.cluster
@pytest.mark.nodes
def test_a_short_soak_of_a_real_endpoint_has_no_error_and_leaves_no_process(tmp_path: Path, capfd: Any) -> None:
    path = tmp_path / "soak.json"
    assert benchmarks(["soak", "--minutes", "0.2", "--rate", "2", "--json", str(path)]) == 0, capfd.readouterr().out
    report = json.loads(path.read_text())
    assert report["answers"]["answered"] > 5
    titles = {row["title"] for row in report["processes"]}
    assert {"raylet", "gcs_server", "ProxyActor", "ServeReplica:t2ray:Generator"} <= titles
    left = [row["pid"] for row in report["processes"] if processes.family(row["pid"]).get(row["pid"]) == row["title"]]
    assert not left
