"""An endpoint as a discrete-event simulation: Poisson arrivals, ingresses, dispatchers, and replicas that batch.

It serves to study fleets that are too large for the machine at hand, and waiting times that averages hide. The times of
its parts come from measurements (`engines`, `queues`). docs/scaling.md says what it leaves out, and how far it is from
a real endpoint.
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
    """The parts of an endpoint. Times are in seconds of one processor.

    Args:
        step_s: number of rows -> time of an engine's step.
        replicas, ingresses, dispatchers: number of processes of each kind.
        rows: most rows in a batch.
        ongoing: `max_ongoing_requests` of a replica; requests beyond `rows` wait in the replica.
        queued: most requests that wait for any replica; further ones are refused.
        prompt_s: time per token of a prompt, added to the step that the prompt joins.
        score_s: time of one scoring of pass 1, and of each further one in the same turn.
        ingress_s, dispatch_s: time per request in one of the ingresses, of the dispatchers.
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
    """The requests: `rate` per second for `seconds`, with prompts of `prompt` tokens and answers of `tokens`.

    `scored` is the share of requests whose pass 1 is not cached.
    """

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
    """A replica: its batch (rows by the step after which they end), requests that wait, and scorings that wait."""

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
    """One run of a fleet under traffic: `Simulation(fleet, traffic).run()`."""

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
        """Runs until the last request is answered; returns counts and percentiles as `evals.load.summary` does."""
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
            replica = self._choose()  # a scoring is short and takes no place in the batch
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
            self.queue.popleft().succeed(replica)  # its place goes to the request that waited longest
        else:
            replica.taken -= 1
        self.finished.append(request)
        self.ends.append(self.env.now)

    def _served(self, processes: simpy.Resource, seconds: float) -> Process:
        with processes.request() as mine:
            yield mine
            yield self.env.timeout(seconds)

    def _choose(self) -> _Replica:
        """Returns the less loaded of two random replicas, as Ray Serve's router does."""
        two = self.draw.sample(self.replicas, min(2, len(self.replicas)))
        return min(two, key=lambda replica: replica.taken)
