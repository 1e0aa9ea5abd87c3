"""An endpoint as a discrete-event simulation: Poisson arrivals, ingresses, dispatchers, and replicas that batch.

For fleets that no machine at hand can hold, and for the waiting that averages hide. The times of its parts come from
measurements (`engines`, `queues`). Not here: Ray. What it leaves out, and how far it is off where an endpoint could be
asked, is in docs/scaling.md.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

from t2ray.evals.load import QUANTILES, percentile

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The endpoint's parts. Times in seconds, of one processor.

    Args:
        step_s: of an engine's step with so many rows.
        prompt_s: of a prompt's token, added to the step that it joins.
        score_s: of pass 1's scoring, of which all that wait share a turn: one, and each further one.
        rows: in a batch at most.
        ongoing: `max_ongoing_requests` of a replica; what it has beyond `rows` waits inside it.
        queued: requests that wait for any replica; further ones are refused.
        ingress_s, dispatch_s: of a request, in one of so many processes.
    """

    step_s: Callable[[int], float]
    replicas: int = 1
    rows: int = 64
    ongoing: int = 64
    queued: int = 128
    prompt_s: float = 0.0
    score_s: tuple[float, float] = (0.0, 0.0)
    ingresses: int = 1
    ingress_s: float = 0.0
    dispatchers: int = 1
    dispatch_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests: `rate` a second for `seconds`; answers of `tokens`, prompts of `prompt`; `scored` is the share of
    requests whose pass 1 is not remembered."""

    rate: float
    seconds: float
    tokens: int = 64
    prompt: int = 16
    scored: float = 0.0
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class _Request:
    due: float
    done: simpy.Event
    first: float | None = None


@dataclass(slots=True, eq=False)
class _Replica:
    """A batch: rows by the step after which they end, what waits to join, and what waits to be scored."""

    env: simpy.Environment
    fleet: Fleet
    traffic: Traffic
    rows: list[tuple[int, int, _Request]] = field(default_factory=list)
    waiting: deque[_Request] = field(default_factory=deque)
    scorings: list[simpy.Event] = field(default_factory=list)
    taken: int = 0
    steps: int = 0
    row_steps: int = 0
    woken: simpy.Event | None = None

    def wake(self) -> None:
        if self.woken is not None and not self.woken.triggered:
            self.woken.succeed()

    def run(self) -> Process:
        fleet = self.fleet
        while True:
            if not (self.rows or self.waiting or self.scorings):
                self.woken = self.env.event()
                yield self.woken
            if scored := self.scorings:
                self.scorings = []
                yield self.env.timeout(fleet.score_s[0] + fleet.score_s[1] * (len(scored) - 1))
                for done in scored:
                    done.succeed()
            joined = [self.waiting.popleft() for _ in range(min(len(self.waiting), fleet.rows - len(self.rows)))]
            for request in joined:
                heapq.heappush(self.rows, (self.steps + self.traffic.tokens, id(request), request))
            if not self.rows:
                continue
            yield self.env.timeout(fleet.step_s(len(self.rows)) + fleet.prompt_s * self.traffic.prompt * len(joined))
            self.steps += 1
            self.row_steps += len(self.rows)
            for request in joined:
                request.first = self.env.now
            while self.rows and self.rows[0][0] <= self.steps:
                heapq.heappop(self.rows)[2].done.succeed()


class Simulation:
    """One run: `Simulation(fleet, traffic).run()`."""

    def __init__(self, fleet: Fleet, traffic: Traffic) -> None:
        self.fleet, self.traffic = fleet, traffic
        self.env = simpy.Environment()
        self.draw = random.Random(traffic.seed)
        self.replicas = [_Replica(self.env, fleet, traffic) for _ in range(fleet.replicas)]
        self.ingress = simpy.Resource(self.env, fleet.ingresses)
        self.dispatcher = simpy.Resource(self.env, fleet.dispatchers)
        self.queue: deque[simpy.Event] = deque()
        self.finished: list[_Request] = []
        self.ends: list[float] = []
        self.refused = 0

    def run(self) -> dict[str, Any]:
        """Until the last request is answered; counts, and percentiles in milliseconds as `load.summary` gives them."""
        for replica in self.replicas:
            self.env.process(replica.run())
        self.env.run(until=self.env.process(self._arrivals()))
        busy = sum(replica.steps for replica in self.replicas)
        seconds = self.env.now
        times = {
            "latency_ms": [end - r.due for r, end in zip(self.finished, self.ends, strict=True)],
            "ttft_ms": [r.first - r.due for r in self.finished if r.first is not None],
        }
        return {
            "requests": len(self.finished) + self.refused,
            "refused": self.refused,
            "requests_per_s": len(self.finished) / seconds,
            "tokens_per_s": len(self.finished) * self.traffic.tokens / seconds,
            "rows_a_step": sum(replica.row_steps for replica in self.replicas) / max(busy, 1),
            **{
                name: {key: 1000 * percentile(values, share) for key, share in QUANTILES.items()}
                for name, values in times.items()
                if values
            },
        }

    def _arrivals(self) -> Process:
        under_way = []
        while True:
            yield self.env.timeout(self.draw.expovariate(self.traffic.rate))
            if self.env.now > self.traffic.seconds:
                break
            under_way.append(self.env.process(self._request()))
        yield self.env.all_of(under_way)

    def _request(self) -> Process:
        request = _Request(due=self.env.now, done=self.env.event())
        yield from self._served(self.ingress, self.fleet.ingress_s)
        if self.fleet.dispatch_s:
            yield from self._served(self.dispatcher, self.fleet.dispatch_s)
        if self.draw.random() < self.traffic.scored:
            scored = self.env.event()
            replica = self._choose()  # pass 1 is short: it takes no place from the generations
            replica.scorings.append(scored)
            replica.wake()
            yield scored
        replica = self._choose()
        if replica.taken >= self.fleet.ongoing:
            if len(self.queue) >= self.fleet.queued:
                self.refused += 1
                return
            place = self.env.event()
            self.queue.append(place)
            replica = yield place
        else:
            replica.taken += 1
        replica.waiting.append(request)
        replica.wake()
        yield request.done
        if self.queue:
            self.queue.popleft().succeed(replica)  # its place goes to who waited longest
        else:
            replica.taken -= 1
        self.finished.append(request)
        self.ends.append(self.env.now)

    def _served(self, processes: simpy.Resource, seconds: float) -> Process:
        with processes.request() as mine:
            yield mine
            yield self.env.timeout(seconds)

    def _choose(self) -> _Replica:
        """The less loaded of two, as Ray Serve's router chooses."""
        two = self.draw.sample(self.replicas, min(2, len(self.replicas)))
        return min(two, key=lambda replica: replica.taken)
