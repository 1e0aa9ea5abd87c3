"""A mixed load for a long time: no request may fail, no request may be left running, and no process may grow.

Requests arrive at random: for whole and streamed answers, by every model name that the endpoint lists, by clients that
disconnect, for experts that are uploaded and deleted, and for a few-shot search now and then. Not here: starting the
endpoint (`private`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.endpoint.processes import family, rss
from t2ray.evals.load import Client, Outcome, chat, open_loop, summary

KINDS = {"whole": 4.0, "stream": 4.0, "gone": 2.0, "text": 1.0, "several": 1.0, "look": 1.0, "expert": 0.3}
"""The relative frequency of each kind of visit."""

SAMPLE_S = 2.0
NOTICED_S = 5.0
"""Seconds within which every replica must know a new expert."""

LEFT_S = 15.0
"""Seconds after the last request within which nothing may run any more."""

WARM = 0.25
"""The share of the time, at the beginning, in which growth does not count: caches fill, libraries are loaded."""

SEARCH = {"population": 8, "elite": 0.25, "iterations": 2}
MIXTURE = "t2ray:math:0.7,code:0.3"
Samples = dict[tuple[int, str], list[tuple[float, int]]]
"""(process id, title) -> (seconds, resident bytes) at some times."""


@dataclass(slots=True, kw_only=True)
class Soak:
    """One run of the load, and its results. `upload` is the content of an expert's file that the endpoint accepts."""

    client: Client
    upload: bytes
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    models: list[str] = field(default_factory=list)
    seen: list[tuple[str, Outcome]] = field(default_factory=list)
    memory: Samples = field(default_factory=dict)

    async def run(
        self, *, rate: float, seconds: float, search_s: float, root: int | None, tell: Callable[[str], None]
    ) -> dict[str, Any]:
        """Puts load on the endpoint for `seconds`; returns a report.

        Args:
            rate: requests per second, on average.
            search_s: seconds between two few-shot searches.
            root: the process whose memory is watched, with that of its descendants; None for none.
            tell: is called with one line of progress per minute.
        """
        listed = await self._note("models", self.client.call("GET", "/v1/models"))
        if listed.error is not None:
            return self._report(seconds)
        self.models = [model["id"] for model in listed.reply["data"]] + [MIXTURE]
        kinds = {"whole": self.whole, "stream": self.stream, "gone": self.gone, "text": self.text,
                 "several": self.several, "look": self.look, "expert": self.expert}  # fmt: skip

        async def visit(number: int, due: float) -> None:
            (kind,) = self.draw.choices(list(KINDS), list(KINDS.values()))
            await kinds[kind](number)

        beside = [
            asyncio.create_task(self._search(search_s)),
            asyncio.create_task(self._watch(root, tell)),
        ]
        await open_loop(visit, rate, seconds)
        for task in beside:
            task.cancel()
        for ended in await asyncio.gather(*beside, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        await self._nothing_left()
        return self._report(seconds)

    # --------------------------------------------------------------------------------------------------------- visits

    async def whole(self, number: int) -> None:
        """Asks for a whole answer."""
        await self._note("whole", self.client.ask(self._body() | self._extras()))

    async def stream(self, number: int) -> None:
        """Reads a stream to its end."""
        await self._note("stream", self.client.ask(self._body(stream=True) | self._extras()))

    async def gone(self, number: int) -> None:
        """Asks for an answer, streamed or not, and disconnects before its end."""
        body = self._body(stream=self.draw.random() < 0.5) | {"max_tokens": 256, "ignore_eos": True}
        try:
            async with asyncio.timeout(self.draw.uniform(0.0, 0.4)):
                await self._note("gone", self.client.ask(body))
        except TimeoutError:
            now = time.perf_counter()
            self.seen.append(("gone", Outcome(due=now, first=None, end=now, status=None)))

    async def text(self, number: int) -> None:
        """Asks to continue two texts."""
        body = {"model": self.draw.choice(self.models), "prompt": [self._prompt(), self._prompt()], "max_tokens": 16}
        await self._note("text", self.client.ask(body, path="/v1/completions"))

    async def several(self, number: int) -> None:
        """Asks for three sampled answers to a prompt."""
        body = self._body(stream=self.draw.random() < 0.5) | {"n": 3, "temperature": 1.0, "top_p": 0.9, "seed": number}
        await self._note("several", self.client.ask(body))

    async def look(self, number: int) -> None:
        """Reads what the page and a monitor read."""
        for path in ("/v1/experts", "/v1/experts/math", "/v1/models", "/v1/load", "/health", "/metrics"):
            await self._note("look", self.client.call("GET", path))

    async def expert(self, number: int) -> None:
        """Uploads an expert, asks it and deletes it."""
        name = f"soak-{number}"
        place = f"/v1/experts/{name}"
        put = await self._note("expert", self.client.call("PUT", place, data=self.upload))
        if put.error is not None:
            return
        start = time.perf_counter()
        while (found := await self.client.call("GET", place)).status == 404 and found.end - start < NOTICED_S:
            await asyncio.sleep(0.1)
        self.seen.append(("expert", found))
        await self._note("expert", self.client.ask(self._body() | {"model": f"t2ray:{name}"}))
        await self._note("expert", self.client.call("DELETE", place))

    async def _search(self, every_s: float) -> None:
        """Runs a few-shot search, and asks the mixture that it finds, again and again."""
        sums = [{"prompt": f"{i}+{2 * i}", "answer": f"{3 * i}"} for i in range(1, 5)]
        body = {"name": "soak", "examples": sums, "verifier": "equal", "max_tokens": 6, "settings": SEARCH}
        while True:
            await asyncio.sleep(every_s)
            started = await self._note("search", self.client.call("POST", "/v1/adaptations", json=body))
            if started.error is not None:
                continue
            place, status = f"/v1/adaptations/{started.reply['id']}", "running"
            while status in ("queued", "running"):
                await asyncio.sleep(0.2)
                found = await self.client.call("GET", place)
                status = "lost" if found.error is not None else found.reply["status"]
            error = found.error or found.reply["error"]
            self.seen.append(("search", replace(found, error=None if status == "succeeded" else f"{status}: {error}")))
            if status == "succeeded":
                await self._note("search", self.client.ask(self._body() | {"model": "t2ray:fewshot/soak"}))

    # ---------------------------------------------------------------------------------------------------------- parts

    def _prompt(self) -> str:
        a, b = self.draw.randrange(50), self.draw.randrange(50)
        return self.draw.choice((f"{a}+{b}", f"add {a} to n", f"larger? A {a} B {b}", "hello Anna, how are you?"))

    def _body(self, *, stream: bool = False) -> dict[str, Any]:
        """Returns the body of a chat by a random model; half of the answers have all tokens that they may have."""
        model, tokens = self.draw.choice(self.models), self.draw.choice((8, 16, 32, 64))
        return chat(self._prompt(), model, max_tokens=tokens, stream=stream, ignore_eos=self.draw.random() < 0.5)

    def _extras(self) -> dict[str, Any]:
        return self.draw.choice(
            (
                {},
                {"temperature": 0.7, "seed": self.draw.randrange(1000)},
                {"stop": ["7", "n"]},
                {"logprobs": True, "top_logprobs": 3},
            )
        )

    async def _note(self, kind: str, call: Any) -> Outcome:
        outcome: Outcome = await call
        self.seen.append((kind, outcome))
        return outcome

    async def _watch(self, root: int | None, tell: Callable[[str], None]) -> None:
        """Records the memory of every process, and calls `tell` once per minute."""
        start, told = time.perf_counter(), 0.0
        while True:
            now = time.perf_counter() - start
            used = 0
            for pid, title in (family(root) if root is not None else {}).items():
                if (size := rss(pid)) is not None:
                    used += size
                    self.memory.setdefault((pid, title), []).append((now, size))
            if now - told >= 60:
                told = now
                bad = sum(outcome.error is not None for _, outcome in self.seen)
                tell(f"{now / 60:.0f} min: {len(self.seen)} requests, {bad} errors, {used / 2**20:,.0f} MB in all")
            await asyncio.sleep(SAMPLE_S)

    async def _nothing_left(self) -> None:
        """Waits until the endpoint is idle; records an error if aborted generations still have their places."""
        start = time.perf_counter()
        while (outcome := await self.client.call("GET", "/v1/load")).end - start < LEFT_S:
            load = outcome.reply
            if outcome.error is None and load["running"] == load["waiting"] == load["kv_used"] == 0:
                return
            await asyncio.sleep(0.2)
        error = outcome.error or f"{LEFT_S:g} s after the last request there still is {outcome.reply}"
        self.seen.append(("left", replace(outcome, error=error)))

    def _report(self, seconds: float) -> dict[str, Any]:
        errors = [f"{kind}: {outcome.error}" for kind, outcome in self.seen if outcome.error is not None]
        whole = [outcome for kind, outcome in self.seen if kind in ("whole", "stream")]
        return {
            "seconds": seconds,
            "visits": dict(Counter(kind for kind, _ in self.seen)),
            "errors": len(errors),
            "error_texts": Counter(errors).most_common(20),
            "answers": summary(whole),
            "processes": growth(self.memory),
        }


def growth(memory: Mapping[tuple[int, str], Sequence[tuple[float, int]]]) -> list[dict[str, Any]]:
    """Returns, per process, its megabytes at the end and their growth per minute, after the first `WARM` of the time.

    Growth is the slope of a least-squares line. It is None for a process that was there for less than half of that
    time.
    """
    last = max((at for samples in memory.values() for at, _ in samples), default=0.0)
    rows = []
    for (pid, title), samples in memory.items():
        warm = [(at / 60, size / 2**20) for at, size in samples if at >= WARM * last]
        lived = warm[-1][0] - warm[0][0] if warm else 0.0
        slope = least_squares(warm) if lived > 0 and lived * 60 >= (1 - WARM) * last / 2 else None
        rows.append({"pid": pid, "title": title, "mb": samples[-1][1] / 2**20, "mb_a_minute": slope})
    return sorted(rows, key=lambda row: -(row["mb_a_minute"] or 0.0))


def least_squares(points: Sequence[tuple[float, float]]) -> float:
    """Returns the slope of the least-squares line through `points`, which must not all have one x."""
    x_mean = sum(x for x, _ in points) / len(points)
    y_mean = sum(y for _, y in points) / len(points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)
