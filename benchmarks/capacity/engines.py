"""The cost of an engine's step by rows, mixtures and attended keys; and several engines on one machine.

The engine is the online engine on the tiny model, as in a replica, without Ray and HTTP. Not here: how prices are
fitted (`fit`), and how an endpoint uses them (`queues`).
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.capacity.fit import Fit, FitPoint, fitted
from benchmarks.endpoint.alone import Unfolded, burst, started, sums
from benchmarks.harness import Figures, measure
from t2ray.core import Mixture, user
from t2ray.engine.online import OnlineEngine
from t2ray.prompts import OTHERS, dispatch_prompt

PROMPT = 6
"""About the number of tokens of a sum (`17+25`) as a prompt of the tiny model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Requests that begin together: number of rows, of different mixtures, and of tokens per answer."""

    rows: int
    mixtures: int
    tokens: int
    held: bool = False

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.mixtures} mixtures, {self.tokens} tokens"

    def terms(self) -> dict[str, float]:
        """Returns what the batch does, counted.

        `step`: forward passes. `row`: tokens. `mixed`, `mixed_row`: the same if there are several mixtures, else 0.
        `attended`: pairs of a query and a key; on a CPU a query attends to the keys of all rows, with a mask.
        `request`: requests, for costs that each has once.
        """
        steps, mixed = float(self.tokens), float(self.mixtures > 1)
        return {
            "step": steps,
            "row": steps * self.rows,
            "mixed": steps * mixed,
            "mixed_row": steps * self.rows * mixed,
            "attended": steps * self.rows**2 * (PROMPT + steps / 2),
            "request": float(self.rows),
        }


GRID = (
    *(Batch(rows=rows, mixtures=rows, tokens=tokens) for rows in (1, 4, 16, 32, 64) for tokens in (32, 64)),
    *(Batch(rows=rows, mixtures=mixtures, tokens=48) for rows, mixtures in ((16, 1), (16, 4), (64, 1), (64, 8))),
    Batch(rows=64, mixtures=64, tokens=96),
    Batch(rows=2, mixtures=2, tokens=64, held=True),
    Batch(rows=8, mixtures=3, tokens=48, held=True),
    Batch(rows=24, mixtures=24, tokens=40, held=True),
    Batch(rows=48, mixtures=16, tokens=64, held=True),
    Batch(rows=56, mixtures=56, tokens=80, held=True),
)

LABELS = ("math", "code", "pick", OTHERS)
SCORED = (1, 2, 4, 8)
SCORED_HELD = (3, 6)
"""Numbers of prompts that are scored at a time; too few for a fold."""

BESIDE = 16
"""Rows of each engine when several engines run at a time."""


def engine(factors: Path, rounds: int = 5, grid: Sequence[Batch] = GRID) -> tuple[Figures, Fit, Fit]:
    """Returns the prices of a step and of a scoring, fitted to the least times of interleaved rounds."""
    torch.set_num_threads(1)
    with started(factors, Unfolded) as subject, asyncio.Runner() as runner:
        assert isinstance(subject, Unfolded)
        *mixtures, other = fill(subject, max(batch.mixtures for batch in grid) + 1)
        times: dict[Batch, list[float]] = {batch: [] for batch in grid}
        scored: dict[int, list[tuple[float, int]]] = {count: [] for count in (*SCORED, *SCORED_HELD)}
        prompts = sums()
        for number in range(rounds + 1):
            for batch, taken in times.items():
                seconds = _burst(runner, subject, batch, mixtures, prompts)
                taken += [seconds] * bool(number)  # the first round warms up
            for count, found in [*scored.items()] * 4:  # four times per round, because they are short
                before = subject.turns
                seconds = runner.run(_score(subject, other, count, prompts))
                found += [(seconds, subject.turns - before)] * bool(number)
    steps = fitted(
        [
            FitPoint(name=str(batch), terms=batch.terms(), seconds=min(taken), held=batch.held)
            for batch, taken in times.items()
        ]
    )
    scores = fitted(
        [
            FitPoint(
                name=f"{count} prompts in {turns} turns",  # the first may begin while the others are tokenised
                terms={"turn": float(turns), "prompt": float(count)},
                seconds=seconds,
                held=count in SCORED_HELD,
            )
            for count, found in scored.items()
            for seconds, turns in [min(found)]
        ]
    )
    return steps.figures() | scores.figures("score_"), steps, scores


def fill(subject: OnlineEngine, experts: int) -> list[Mixture]:
    """Gives an engine so many random experts; returns one mixture per expert."""
    draw = torch.Generator().manual_seed(0)
    bank = {f"e{i}": 1 + 0.1 * torch.randn(subject.model.adapter.size, generator=draw) for i in range(experts)}
    subject.set_experts(bank)
    return [Mixture.parse(name) for name in bank]


def _burst(
    runner: asyncio.Runner, subject: OnlineEngine, batch: Batch, mixtures: list[Mixture], prompts: Iterator[str]
) -> float:
    turns = itertools.cycle(mixtures[: batch.mixtures])
    start = time.perf_counter()
    runner.run(burst(subject, turns, prompts, rows=batch.rows, each=1, tokens=batch.tokens))
    return time.perf_counter() - start


async def _score(subject: OnlineEngine, mixture: Mixture, count: int, prompts: Iterator[str]) -> float:
    start = time.perf_counter()
    questions = [dispatch_prompt(user(next(prompts)), LABELS) for _ in range(count)]
    await asyncio.gather(*(subject.score(question, LABELS, mixture) for question in questions))
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------------ several engines


def beside(factors: Path, engines: int = 2, seconds: float = 12.0) -> Figures:
    """Returns the tokens per second of several engines, in a process each, over those of one."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(engines, mp_context=spawn) as processes, multiprocessing.Manager() as manager:
        speeds = []
        for count in (1, engines):
            ready = manager.Barrier(count)
            runs = [processes.submit(_speed, factors, seconds, ready) for _ in range(count)]
            speeds.append(sum(run.result() for run in runs))
    return {"over_one": measure([speeds[1] / speeds[0]]), "tokens_per_s": measure(speeds[:1])}


def _speed(factors: Path, seconds: float, ready: threading.Barrier) -> float:
    """Returns the tokens per second of one engine, measured once all engines are ready."""
    torch.set_num_threads(1)
    batch, tokens = Batch(rows=BESIDE, mixtures=BESIDE, tokens=64), 0
    with started(factors) as subject, asyncio.Runner() as runner:
        mixtures, prompts = fill(subject, BESIDE), sums()
        _burst(runner, subject, batch, mixtures, prompts)
        ready.wait()
        start = time.perf_counter()
        while (took := time.perf_counter() - start) < seconds:
            _burst(runner, subject, batch, mixtures, prompts)
            tokens += batch.rows * batch.tokens
    return tokens / took
