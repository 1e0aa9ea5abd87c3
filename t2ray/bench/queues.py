"""An endpoint under random arrivals beside its simulation; and the processor time that each of its processes takes.

The endpoint is a private one on the tiny model, with one replica, on a machine that its client shares. The simulation's
times are measured apart from it: an engine's by itself (`engines`), the rest's from one request at a time and from the
processor time that they take. Not here: the simulation (`simulate`), and the load generator (`load`).
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from t2ray.bench.alone import sums
from t2ray.bench.endpoint import private
from t2ray.bench.engines import PROMPT, Batch
from t2ray.bench.fit import HELD_OUT, Fit
from t2ray.bench.harness import Figures, measure
from t2ray.bench.load import Client, Outcome, chat, closed_loop, open_loop, summary
from t2ray.bench.processes import family
from t2ray.bench.simulate import Fleet, Load, Simulation
from t2ray.core import ResourceError

TOKENS = 64
MODELS = ("t2ray:math", "t2ray:code", "t2ray:pick", "t2ray:math:0.7,code:0.3")
ROWS = 32
"""Requests at a time that fill the endpoint, when its processes' time is taken."""

SHARES = (0.3, 0.5, 0.7)
"""Of what it can do at most, so many requests a second arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What the endpoint itself shows: seconds of a request that comes alone, requests a second with `ROWS` at a time,
    and the processor time of each process for one of these."""

    alone_s: float
    capacity: float
    cpu_s: Mapping[str, float]


def fleet(steps: Fit, scores: Fit, times: Times) -> Fleet:
    """One replica with the engine's prices, stretched to what the endpoint reaches with `ROWS` at a time.

    The stretch is the processor that the replica shares: with its own event loop, with the ingress and the client. What
    a lone request takes beyond the engine's time is the ingress's, and in no queue but its own.
    """

    def step_s(rows: int) -> float:
        batch = Batch(rows=rows, mixtures=min(rows, len(MODELS)), tokens=TOKENS)
        return steps.seconds(batch.terms() | {"request": 0.0}) / TOKENS

    each = steps.prices.get("request", 0.0)
    full = (TOKENS * step_s(ROWS) + each * ROWS) / ROWS
    stretch = 1 / times.capacity / full
    ingress_s = max(times.alone_s - TOKENS * step_s(1) - each, 0.0)
    turn = scores.seconds({"turn": 1.0, "prompt": 1.0})
    return Fleet(
        step_s=lambda rows: stretch * step_s(rows),
        prompt_s=stretch * each / PROMPT,
        score_s=(stretch * turn, stretch * scores.prices.get("prompt", 0.0)),
        ingress_s=ingress_s,
        ingresses=ROWS,  # it waits for the network and for Ray most of that time
    )


def endpoint(
    folder: Path, steps: Fit, scores: Fit, *, seconds: float = 25.0, shares: Sequence[float] = SHARES
) -> tuple[Figures, dict[str, Any]]:
    """Latency and throughput as measured and as simulated, at each share of what the endpoint can do."""
    figures, rows, errors = Figures(), [], []
    with private(folder, folder / "factors", {"num_replicas": 1}) as place, asyncio.Runner() as runner:
        asked = _Asked(place.url)
        times = _times(asked, runner, place.pid)
        simulated = fleet(steps, scores, times)
        for share in shares:
            rate = share * times.capacity
            real = runner.run(asked.arrivals(rate, seconds))
            load = Load(rate=rate, seconds=seconds, tokens=TOKENS, prompt=PROMPT)
            # Of one short run chance makes much: the median of many is what the model says.
            runs = [Simulation(simulated, replace(load, seed=seed)).run() for seed in range(15)]
            row: dict[str, Any] = {"share": share, "rate": rate, "errors": real["errors"]}
            for name in ("p50", "p90"):
                said = statistics.median(run["latency_ms"][name] for run in runs)
                row[name] = {"measured_ms": real["latency_ms"][name], "simulated_ms": said}
                figures[f"simulated_{name}_at_{share:g}"] = measure([said / real["latency_ms"][name]])
            errors.append(abs(row["p50"]["simulated_ms"] / row["p50"]["measured_ms"] - 1))
            rows.append(row | {"requests": real["requests"]})
    figures["simulated_p50_error"] = measure([max(errors)], HELD_OUT, at_most=True)
    figures["capacity_per_s"] = measure([times.capacity])
    figures["alone_ms"] = measure([1000 * times.alone_s])
    figures |= {f"cpu_ms_a_request_{name}": measure([1000 * value]) for name, value in times.cpu_s.items()}
    return figures, {"loads": rows, "cpu_s": dict(times.cpu_s)}


def _times(asked: _Asked, runner: asyncio.Runner, root: int) -> Times:
    runner.run(asked.closed(ROWS, 2))  # warm
    alone = [outcome.seconds for outcome in runner.run(asked.closed(1, 12))]
    before, start = _cpu(root), time.perf_counter()
    count = len(runner.run(asked.closed(ROWS, 8)))
    took, after = time.perf_counter() - start, _cpu(root)
    cpu_s: dict[str, float] = {}
    for (pid, title), seconds in after.items():
        name = title.rpartition(":")[2].lower()
        cpu_s[name] = cpu_s.get(name, 0.0) + (seconds - before.get((pid, title), 0.0)) / count
    most = sorted(cpu_s.items(), key=lambda item: -item[1])[:6]
    return Times(alone_s=statistics.median(alone), capacity=count / took, cpu_s=dict(most))


def _cpu(root: int) -> dict[tuple[int, str], float]:
    """Processor seconds of each process so far."""
    found = {}
    for pid, title in family(root).items():
        try:
            spent = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[pid, title] = spent.user + spent.system
    return found


class _Asked:
    """Requests for the models in turn, each prompt once."""

    def __init__(self, url: str) -> None:
        self.url, self.prompts, self.models = url, sums(), itertools.cycle(MODELS)

    async def _ask(self, client: Client, due: float | None = None) -> Outcome:
        body = chat(next(self.prompts), next(self.models), max_tokens=TOKENS, ignore_eos=True)
        return await client.ask(body, due=due)

    async def closed(self, rows: int, each: int) -> list[Outcome]:
        """So many at a time.

        Raises:
            ResourceError: one was not answered.
        """
        async with Client(self.url) as client:
            outcomes = await closed_loop(lambda _: self._ask(client), rows, each)
        for outcome in outcomes:
            if outcome.error is not None:
                raise ResourceError(f"the private endpoint failed: {outcome.error}")
        return outcomes

    async def arrivals(self, rate: float, seconds: float) -> dict[str, Any]:
        """At random times."""
        async with Client(self.url) as client:
            return summary(await open_loop(lambda _, due: self._ask(client, due), rate, seconds))
