"""The cross-entropy method over mixing weights (paper section 3.2, c). numpy only.

It searches vectors by their fitness and knows nothing of experts, prompts or models (`fewshot` does). One seed and a
deterministic objective always give the same result.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from t2ray.config.search import CEMConfig
from t2ray.core import ConfigError

Array = NDArray[np.float64]


class Fitness(NamedTuple):
    """How good a member is: its accuracy in 0..1; among equal ones, the mean log-likelihood (nats) of right answers."""

    accuracy: float
    log_likelihood: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of the search: the fitness of its best member, the elites' mean and sigma, and totals so far."""

    iteration: int
    best: Fitness
    mean_accuracy: float
    mean: tuple[float, ...]
    sigma: tuple[float, ...]
    prompts: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CEMResult:
    """The chosen member (D,), its fitness when it was evaluated last, the rounds, and the prompts of all in all."""

    alpha: Array
    fitness: Fitness
    history: tuple[Round, ...]
    prompts: int


Objective = Callable[[Array], Awaitable[Sequence[Fitness]]]
"""The fitness of each of P members, given as (P, D)."""

FINALISTS = 4  # members that the last evaluation compares with the elites' mean
FLOOR = 0.02  # least sigma as a share of high - low: elites that agree by chance must not end the search at once


async def cem(
    objective: Objective,
    seeds: Array,
    settings: CEMConfig,
    *,
    prompts_per_member: int = 1,
    progress: Callable[[Round], None] | None = None,
) -> CEMResult:
    """Searches for the vector of the highest fitness.

    Each round evaluates its whole population in one call. The members of highest fitness are the elites; the next round
    is drawn from their distribution. The best member is evaluated again in the next round, so that a lucky draw of an
    objective that samples does not survive. At the end, the four best members of all rounds and the elites' mean are
    evaluated once more, and the best of these wins.

    Args:
        objective: (P, D) members -> P values of fitness.
        seeds: (S, D); the first is the mean of the first round. All are members of the first round, clipped into the
            bounds, so that the result of a deterministic objective is never worse than any of them.
        prompts_per_member: the number of prompts that one member costs.

    Raises:
        ConfigError: `budget_prompts` is too small for the first round and the last comparison.
    """
    size, budget = max(settings.population, len(seeds)), settings.budget_prompts
    least = (size + FINALISTS + 1) * prompts_per_member
    if budget is not None and budget < least:
        raise ConfigError(
            f"budget_prompts is {budget}; a population of {size} on {prompts_per_member} prompts needs {least}: "
            "raise the budget, or lower population or the number of shots"
        )
    seen: dict[bytes, tuple[Fitness, Array]] = {}

    async def remembered(members: Array) -> list[Fitness]:
        fitness = list(await objective(members))
        seen.update({member.tobytes(): (f, member) for f, member in zip(fitness, members, strict=True)})
        return fitness

    history = await _rounds(remembered, seeds, settings, prompts_per_member, progress)
    ranked = sorted(seen.values(), key=lambda pair: pair[0], reverse=True)
    middle = np.clip(history[-1].mean, settings.low, settings.high)  # a mean at a bound can be rounded past it
    finalists = np.vstack([*(member for _, member in ranked[:FINALISTS]), middle])
    fitness = await remembered(finalists)
    winner = max(range(len(fitness)), key=fitness.__getitem__)
    prompts = history[-1].prompts + len(finalists) * prompts_per_member
    return CEMResult(alpha=finalists[winner], fitness=fitness[winner], history=history, prompts=prompts)


async def _rounds(
    objective: Objective,
    seeds: Array,
    settings: CEMConfig,
    prompts_per_member: int,
    progress: Callable[[Round], None] | None,
) -> tuple[Round, ...]:
    rng = np.random.default_rng(settings.seed)
    low, high = settings.low, settings.high
    elite_count = max(1, round(settings.elite * settings.population))

    def sample(mean: Array, sigma: Array, count: int) -> Array:
        return np.clip(rng.normal(mean, sigma, (count, len(mean))), low, high)

    seeds = np.clip(seeds, low, high)
    drawn = sample(seeds[0], np.full_like(seeds[0], settings.sigma), max(0, settings.population - len(seeds)))
    population = np.vstack([seeds, drawn])
    history: list[Round] = []
    start, prompts, slowest_s = time.perf_counter(), 0, 0.0
    for iteration in range(settings.iterations):
        began = time.perf_counter()
        fitness = list(await objective(population))
        order = sorted(range(len(fitness)), key=fitness.__getitem__, reverse=True)
        elites = population[order[:elite_count]]
        mean, spread = elites.mean(axis=0), elites.std(axis=0)
        sigma = np.maximum(spread, FLOOR * (high - low))
        prompts += len(population) * prompts_per_member
        now = time.perf_counter()
        slowest_s = max(slowest_s, now - began)
        last = Round(
            iteration=iteration,
            best=fitness[order[0]],
            mean_accuracy=float(np.mean([f.accuracy for f in fitness])),
            mean=tuple(mean.tolist()),
            sigma=tuple(sigma.tolist()),
            prompts=prompts,
            seconds=now - start,
        )
        history.append(last)
        if progress is not None:
            progress(last)
        left = float("inf") if settings.budget_prompts is None else settings.budget_prompts - prompts
        if left < (settings.population + FINALISTS + 1) * prompts_per_member:
            break
        if settings.budget_s is not None and last.seconds + slowest_s > settings.budget_s:
            break
        if (spread < FLOOR * (high - low)).all():
            break
        population = np.vstack([population[order[:1]], sample(mean, sigma, settings.population - 1)])
    return tuple(history)
