"""The cost of Serve and HTTP: a private endpoint compared with the engine alone.

The endpoint is `t2ray serve` with one `Generator`. This process asks it over HTTP, and runs the engine alone too. One
works while the other waits, so that each has the machine to itself. Not here: the engine alone (`many`), and starting
the endpoint (`private`).
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.endpoint.alone import Size, burst, by_round, started, sums
from benchmarks.endpoint.private import SHIPPED, Endpoint, private
from benchmarks.endpoint.processes import pss
from benchmarks.harness import Figures, Times, Work, interleaved, measure, ratio
from t2ray.core import ConfigError, Mixture, ResourceError
from t2ray.engine.online import OnlineEngine
from t2ray.evals.load import Client, Outcome, chat, closed_loop, open_loop, percentile
from t2ray.experts.follow import Follower
from t2ray.experts.registry import Registry

ONE = "math"
SPREAD = ("math", "code", "pick", "math:0.7,code:0.3")
"""Mixtures of the shipped experts: `ONE` for all requests, or those of `SPREAD` in turn."""

OF_A_MODEL = Size(rounds=3, tokens=48)
"""How much is measured of another model, which is slower."""

LOADED = 0.7
"""The share of the endpoint's capacity at which its first tokens are timed."""

NOTICED_S = 5.0
REGISTERED_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The same model as an endpoint and as an engine. Each of `prompts` is asked once, so that no pass 1 is cached.

    `mixtures` are those of a load of several; all requests of another have the first.
    """

    endpoint: Endpoint
    client: Client
    engine: OnlineEngine
    runner: asyncio.Runner
    size: Size
    mixtures: tuple[str, ...] = SPREAD
    prompts: Iterator[str] = field(default_factory=sums)

    def alone(self, mixtures: tuple[str, ...], rows: int = 1, each: int = 1) -> None:
        """Sends requests to the engine."""
        parsed = itertools.cycle(Mixture.parse(text) for text in mixtures)
        work = burst(self.engine, parsed, self.prompts, rows=rows, each=each, tokens=self.size.tokens)
        self.runner.run(work)

    def http(
        self, models: tuple[str, ...], rows: int = 1, each: int = 1, *, stream: bool = False, prompt: str | None = None
    ) -> list[Outcome]:
        """Sends the same requests to the endpoint, all with `prompt` if it is given.

        Raises:
            ResourceError: a request failed, or its answer does not have all its tokens.
        """
        work = closed_loop(lambda number: self._ask(models[number % len(models)], stream, prompt), rows, each)
        return checked(self.runner.run(work), self.size.tokens)

    def arrivals(self, rate: float, seconds: float, model: str) -> list[Outcome]:
        """Reads streams that begin at the times of a Poisson process of `rate` per second; raises as `http` does."""
        work = open_loop(lambda _, due: self._ask(model, True, None, due), rate, seconds)
        return checked(self.runner.run(work), self.size.tokens)

    async def _ask(self, model: str, stream: bool, prompt: str | None, due: float | None = None) -> Outcome:
        tokens = self.size.tokens
        body = chat(prompt or next(self.prompts), f"t2ray:{model}", max_tokens=tokens, stream=stream, ignore_eos=True)
        return await self.client.ask(body, due=due)


@contextmanager
def paired(
    folder: Path, factors: Path, runner: asyncio.Runner, size: Size, *, model: str = "tiny", experts: Path = SHIPPED,
    mixtures: tuple[str, ...] = SPREAD,
) -> Iterator[Pair]:  # fmt: skip
    """Starts an endpoint and an engine, both with the same experts."""
    replica = {"num_replicas": 1}
    with (
        private(folder, factors, replica, model=model, experts=experts) as endpoint,
        started(factors, model=model) as engine,
    ):
        follower = Follower(Registry(experts), engine.base_digest, engine.layout, engine.model.adapter.join)
        follower.sync()
        engine.set_experts(follower.snapshot.tensors)
        client = runner.run(Client(endpoint.url).__aenter__())
        try:
            yield Pair(
                endpoint=endpoint, client=client, engine=engine, runner=runner, size=size, mixtures=mixtures
            )  # fmt: skip
        finally:
            runner.run(client.__aexit__(None, None, None))


def mixtures_of(experts: Path) -> tuple[str, ...]:
    """Returns four mixtures of the experts in a registry, the first of one expert alone.

    Raises:
        ConfigError: there are fewer than two experts.
    """
    names = [manifest.name for manifest in Registry(experts).list() if not manifest.labels]
    if len(names) < 2:
        raise ConfigError(f"{experts} holds {len(names)} experts; name a registry of two or more by --experts")
    first, second, *_ = names
    return (*names[:3], f"{first}:0.7,{second}:0.3", f"{first}:0.3,{second}:0.7")[:4]


def checked(outcomes: list[Outcome], tokens: int) -> list[Outcome]:
    """Returns `outcomes` themselves if each has `tokens` tokens; raises ResourceError otherwise."""
    for outcome in outcomes:
        if outcome.error is not None or outcome.tokens != tokens:
            raise ResourceError(f"the endpoint gave {outcome.tokens} tokens of {tokens}: {outcome.error}")
    return outcomes


def added(pair: Pair) -> Figures:
    """Returns the milliseconds by which a request through the endpoint takes longer than in the engine alone.

    One request is sent at a time. The share of pass 1 is that which the answers report.
    """
    size, replies = pair.size, list[Outcome]()
    times = interleaved(
        {
            "engine": lambda: pair.alone((ONE,)),
            "http": lambda: pair.http((ONE,)),
            "uncached": lambda: replies.extend(pair.http(("cls",))),
            "cached": lambda: pair.http(("cls",), prompt="17+25"),
        },
        size.rounds * size.single,
    )
    ms = {name: [1000 * one for one in by_round(seconds, size.rounds)] for name, seconds in times.items()}
    replies = replies[-size.rounds * size.single :]  # without the first round, which does not count
    for outcome in replies:
        if outcome.extension["cached"]:
            raise ResourceError("a prompt was asked before: pass 1 came from the cache")
    shares = [outcome.extension["pass1_ms"] / outcome.extension["pass2_ms"] for outcome in replies]

    def more(name: str, base: str) -> list[float]:
        return [a - b for a, b in zip(ms[name], ms[base], strict=True)]

    return {
        "added_ms": measure(more("http", "engine"), 15.0, at_most=True),
        "added_with_dispatch_ms": measure(more("uncached", "engine")),
        "added_with_cached_dispatch_ms": measure(more("cached", "engine")),
        "pass1_share": measure(by_round(shares, size.rounds), 0.10, at_most=True),
        "pass1_ms": measure(by_round([o.extension["pass1_ms"] for o in replies], size.rounds)),
        "cached_pass1_ms": measure(more("cached", "http")),
        "engine_ms": measure(ms["engine"]),
        "http_ms": measure(ms["http"]),
    }


def throughput(pair: Pair) -> Figures:
    """Returns the tokens per second of `size.rows` requests at a time, over those of the engine alone.

    `mixed`: four mixtures in turn. `one`: one mixture, which is folded where that pays.
    """
    size = pair.size
    rows, each = size.rows, size.each
    sides: dict[str, Work] = {}
    for kind, names in (("mixed", pair.mixtures), ("one", pair.mixtures[:1])):
        sides[f"engine_{kind}"] = partial(pair.alone, names, rows=rows, each=each)
        sides[f"whole_{kind}"] = partial(pair.http, names, rows=rows, each=each)
        sides[f"stream_{kind}"] = partial(pair.http, names, rows=rows, each=each, stream=True)
    times = interleaved(sides, size.rounds)
    figures: Figures = {
        f"{way}_{kind}": measure(ratio(times, f"engine_{kind}", f"{way}_{kind}"), 0.8)
        for kind in ("mixed", "one")
        for way in ("whole", "stream")
    }
    return figures | {f"{name}_tokens_per_s": measure(_speed(times, name, size)) for name in times}


def _speed(times: Times, name: str, size: Size) -> list[float]:
    return [size.rows * size.each * size.tokens / seconds for seconds in times[name]]


def first_token(pair: Pair) -> Figures:
    """Returns the milliseconds to the first token of streams that arrive at random, at `LOADED` of the capacity.

    They ask for the model `t2ray:cls` with new prompts, so that the time has both passes and the wait for a place.
    """
    size = pair.size
    start = time.perf_counter()
    asked = len(pair.http(("cls",), rows=size.rows, each=size.each, stream=True))
    capacity = asked / (time.perf_counter() - start)
    parts = [pair.arrivals(LOADED * capacity, size.open_s / size.rounds, "cls") for _ in range(size.rounds)]
    first_ms = [[1000 * (o.first - o.due) for o in part if o.first is not None] for part in parts if part]
    token_ms = [[1000 * (o.end - o.first) / (o.tokens - 1) for o in part if o.first] for part in parts if part]
    everything = [one for part in first_ms for one in part]
    return {
        "capacity_per_s": measure([capacity]),
        "requests": measure([len(everything)]),
        "p50_ms": measure([percentile(part, 0.5) for part in first_ms]),
        "p99_ms": measure([percentile(everything, 0.99)]),  # over all parts, because one has too few requests
        "per_token_p50_ms": measure([percentile(part, 0.5) for part in token_ms]),
    }


def registered(pair: Pair, shelf: Path) -> Figures:
    """Adds all experts of `shelf` to the registry, and returns what changes.

    The figures are the time of a request over that without these experts, the seconds until the endpoint knows them,
    and the megabytes by which the replica's process grows.
    """
    size, count = pair.size, len(list(shelf.iterdir()))
    replica, few, many, noticed, grown = pair.endpoint.replica("Generator"), [], [], [], []
    known = _known(pair)

    def latency() -> float:
        times = interleaved({"http": lambda: pair.http((ONE,))}, size.single)
        return statistics.median(times["http"])

    for _ in range(REGISTERED_ROUNDS):
        few.append(latency())
        before = pss(replica)
        names = move(shelf, pair.endpoint.registry)
        noticed.append(_until(pair, known + count))
        grown.append((pss(replica) - before) / 2**20)
        many.append(latency())
        move(pair.endpoint.registry, shelf, names)
        _until(pair, known)
    return {
        "latency_over_few": measure([a / b for a, b in zip(many, few, strict=True)], 1.05, at_most=True),
        "noticed_s": measure(noticed, NOTICED_S, at_most=True),
        "replica_grows_mb": measure(grown[:1]),  # later rounds reuse the memory of the first
    }


def move(source: Path, target: Path, names: list[str] | None = None) -> list[str]:
    """Moves experts, by default all, from one registry to another; returns their names."""
    names = [path.name for path in source.iterdir()] if names is None else names
    for name in names:
        (source / name).rename(target / name)
    return names


def _known(pair: Pair) -> int:
    outcome = pair.runner.run(pair.client.call("GET", "/v1/experts"))
    if outcome.error is not None:
        raise ResourceError(f"the endpoint's experts cannot be listed: {outcome.error}")
    return len(outcome.reply["data"])


def _until(pair: Pair, count: int) -> float:
    """Waits until the endpoint knows `count` experts; returns the seconds."""
    start = time.perf_counter()
    while _known(pair) != count:
        if time.perf_counter() - start > 60:
            raise ResourceError(f"the endpoint does not know {count} experts after 60 s")
        time.sleep(0.05)
    return time.perf_counter() - start
