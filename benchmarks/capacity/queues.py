"""An endpoint under random arrivals, compared with its simulation; and the processor time of each of its processes.

The endpoint is a private one on the tiny model, with one replica, on the machine on which its client runs too. The
times of the simulation are those of the engine alone (`engines`), adjusted by two figures of the endpoint; its
latencies under random arrivals are compared with the measured ones. Not here: the simulation (`simulate`).
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.capacity.engines import PROMPT, Batch
from benchmarks.capacity.fit import HELD_OUT, Fit, FitPoint, fitted
from benchmarks.capacity.simulate import Fleet, Simulation, Traffic
from benchmarks.endpoint.private import private
from benchmarks.endpoint.processes import family
from benchmarks.harness import Figures, measure
from t2ray.core import ResourceError
from t2ray.evals.load import Client, Outcome, chat, closed_loop, open_loop, summary
from t2ray.tasks import builtin

TOKENS = 64
MODELS = ("t2ray:math", "t2ray:code", "t2ray:pick", "t2ray:math:0.7,code:0.3")
ROWS = 32
"""Requests at a time that fill the endpoint."""

DISPATCHED = ("t2ray:cls",)
"""A model name for which pass 1 decides."""

LOADS: tuple[tuple[float, tuple[str, ...]], ...] = ((0.3, MODELS), (0.5, MODELS), (0.7, MODELS), (0.5, DISPATCHED))
"""The rates of requests, as shares of the endpoint's capacity, and the models that they ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSpeed:
    """Two figures of the endpoint: seconds of a request alone, and requests per second with `ROWS` at a time."""

    alone_s: float
    capacity: float


def fleet(steps: Fit, scores: Fit, times: EndpointSpeed) -> Fleet:
    """Returns one replica with the engine's prices, times a stretch, plus a time that each request spends elsewhere.

    The stretch stands for sharing the processor with the engine's event loop, the ingress and the client. Stretch and
    time are fitted to two figures of the endpoint: one request alone, and `ROWS` at a time.
    """

    def step_s(rows: int) -> float:
        batch = Batch(rows=rows, mixtures=min(rows, len(MODELS)), tokens=TOKENS)
        return steps.seconds(batch.terms() | {"request": 0.0}) / TOKENS

    each = steps.prices.get("request", 0.0)
    seen = {1: times.alone_s, ROWS: ROWS / times.capacity}
    prices = fitted(
        [
            FitPoint(
                name=f"{rows}", terms={"engine": TOKENS * step_s(rows) + each * rows, "rest": 1.0}, seconds=seconds
            )
            for rows, seconds in seen.items()
        ]
    ).prices
    stretch = prices.get("engine", 1.0)
    further = stretch * scores.prices.get("prompt", 0.0)
    return Fleet(
        step_s=lambda rows: stretch * step_s(rows),
        prompt_s=stretch * each / PROMPT,
        score_s=(stretch * scores.prices.get("turn", 0.0) + further, further),
        ingress_s=prices.get("rest", 0.0),
        ingresses=1000,  # most of that time is waiting, which requests do at the same time
    )


def endpoint(folder: Path, steps: Fit, scores: Fit, seconds: float = 20.0) -> tuple[Figures, dict[str, Any]]:
    """Returns simulated latencies over measured ones, at each of `LOADS`, and the endpoint's capacity."""
    figures, rows, errors = Figures(), [], []
    with private(folder, folder / "factors", {"num_replicas": 1}) as place, asyncio.Runner() as runner:
        requester = _Requester(place.url)
        runner.run(requester.closed(ROWS, 2))  # warm
        alone_s, capacities, real = [], [], []
        for share, models in LOADS:
            alone_s += [outcome.seconds for outcome in runner.run(requester.closed(1, 8))]
            start = time.perf_counter()
            count = len(runner.run(requester.closed(ROWS, 6)))
            capacities.append(count / (time.perf_counter() - start))
            real.append(runner.run(requester.arrivals(share * capacities[0], seconds, models)))
        cpu_s = _spent(requester, runner, place.pid)
    times = EndpointSpeed(alone_s=statistics.median(alone_s), capacity=statistics.median(capacities))
    made = fleet(steps, scores, times)
    for (share, models), seen in zip(LOADS, real, strict=True):
        scored = float(models == DISPATCHED)
        rate, name = share * capacities[0], f"{share:g}" + "_pass1" * bool(scored)
        traffic = Traffic(rate=rate, seconds=seconds, tokens=TOKENS, prompt=PROMPT, scored=scored)
        # One short run depends on chance; the median of several is the model's prediction.
        runs = [Simulation(made, replace(traffic, seed=seed)).run() for seed in range(15)]
        row = {"load": name, "rate": rate, "requests": seen["requests"], "errors": seen["errors"]}
        for key in ("p50", "p90"):
            said = statistics.median(run["latency_ms"][key] for run in runs)
            row[key] = {"measured_ms": seen["latency_ms"][key], "simulated_ms": said}
            figures[f"{key}_at_{name}"] = measure([said / seen["latency_ms"][key]])
        errors.append(abs(row["p50"]["simulated_ms"] / row["p50"]["measured_ms"] - 1))
        rows.append(row)
    figures["p50_error"] = measure([max(errors)], HELD_OUT, at_most=True)
    figures["capacity_per_s"] = measure(capacities)
    figures["alone_ms"] = measure([1000 * each for each in alone_s])
    figures |= {f"cpu_ms_{name}": measure([1000 * value]) for name, value in cpu_s.items()}
    return figures, {"loads": rows, "cpu_s": cpu_s}


def _spent(requester: _Requester, runner: asyncio.Runner, root: int) -> dict[str, float]:
    """Returns the processor seconds that a request with pass 1 takes in each of the six busiest processes."""
    before = _cpu(root)
    count = len(runner.run(requester.closed(ROWS, 6, DISPATCHED)))
    cpu_s: dict[str, float] = {}
    for (pid, title), spent in _cpu(root).items():
        name = title.rpartition(":")[2].lower()
        cpu_s[name] = cpu_s.get(name, 0.0) + (spent - before.get((pid, title), 0.0)) / count
    return dict(sorted(cpu_s.items(), key=lambda item: -item[1])[:6])


def _cpu(root: int) -> dict[tuple[int, str], float]:
    """Returns the processor seconds of each process so far, by id and title."""
    found = {}
    for pid, title in family(root).items():
        try:
            spent = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[pid, title] = spent.user + spent.system
    return found


class _Requester:
    """Sends requests to an endpoint, for some models in turn.

    Each prompt is asked once. The prompts are those of the tiny model's tasks in turn, so that pass 1 sends requests at
    one time to different experts, and no expert is folded.
    """

    def __init__(self, url: str) -> None:
        kinds = zip(*(builtin(name).examples("train") for name in ("math", "code", "pick")), strict=False)
        self.url, self.examples = url, itertools.chain.from_iterable(kinds)

    async def closed(self, rows: int, each: int, models: Sequence[str] = MODELS) -> list[Outcome]:
        """Sends `rows` requests at a time, `each` times.

        Raises:
            ResourceError: a request was not answered.
        """
        turns = itertools.cycle(models)
        async with Client(self.url) as client:
            outcomes = await closed_loop(lambda _: client.ask(self._body(next(turns))), rows, each)
        for outcome in outcomes:
            if outcome.error is not None:
                raise ResourceError(f"the private endpoint failed: {outcome.error}")
        return outcomes

    async def arrivals(self, rate: float, seconds: float, models: Sequence[str]) -> dict[str, Any]:
        """Sends requests at random times; refused requests are among the errors."""
        turns = itertools.cycle(models)
        async with Client(self.url) as client:

            async def send(_: int, due: float) -> Outcome:
                return await client.ask(self._body(next(turns)), due=due)

            return summary(await open_loop(send, rate, seconds))

    def _body(self, model: str) -> dict[str, Any]:
        (turn,) = next(self.examples).messages
        return chat(turn.text, model, max_tokens=TOKENS, ignore_eos=True)
