"""The status of a run, read from its folder alone: also while it runs, on any storage, from any machine. No ray."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from t2ray.config.train import TrainConfig
from t2ray.core import RunError
from t2ray.runs.heartbeat import Fault, Heartbeat, heartbeats, read_fault
from t2ray.training.checkpoint import latest, steps
from t2ray.training.domain import Result, damage, domain_store, finished
from t2ray.training.metrics import check_metrics, notes, seconds_left
from t2ray.training.trackers import Track, tracks

STALE_S = 30.0  # a worker whose last heartbeat is older does not run any more


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainStatus:
    """One domain of a run. Figures are those of the newest step; `left_s` is estimated from the last ten steps.

    `skipped`, `timeouts` and `errors` are sums over the steps so far (`StepMetrics`).

    `checkpoint` is the step of the newest one; of a domain that does not run, of the newest sound one. `damaged` has a
    line about each file that is, `notes` one about each that was and what became of it.
    """

    domain: str
    state: Literal["waiting", "running", "done", "failed", "stopped"]
    step: int
    steps: int
    reward: float | None
    accuracy: float | None
    validation: float | None
    kl: float | None
    tokens_per_s: float | None
    answer_tokens: float | None
    cut: float | None
    same_reward: float | None
    skipped: int
    timeouts: int
    errors: int
    left_s: float | None
    checkpoint: int | None
    result: Result | None
    workers: tuple[Heartbeat, ...]
    trackers: dict[str, Track]
    fault: Fault | None
    damaged: tuple[str, ...]
    notes: tuple[str, ...]


def read_status(config: TrainConfig) -> list[DomainStatus]:
    """Returns the status of every domain that a run trains, in the job's order."""
    return [_domain(config, domain) for domain in config.trains]


def _domain(config: TrainConfig, domain: str) -> DomainStatus:
    store, now = domain_store(config, domain), time.time()
    figures, workers, result, fault = check_metrics(store), heartbeats(store), finished(store), read_fault(store)
    rows, damaged, lost = figures.rows, list(figures.damage), damage(store)
    damaged += [lost] if lost else []
    last = rows[-1] if rows else None
    alive = tuple(worker for worker in workers if now - worker.at < STALE_S)
    began = max((worker.began for worker in workers), default=0.0)
    state: Literal["waiting", "running", "done", "failed", "stopped"]
    if result is not None:
        state = "done"
    elif fault is not None and fault.ended and fault.at >= began:
        state = "failed"
    elif alive:
        state = "running"
    else:
        state = "stopped" if rows or workers or steps(store) else "waiting"
    steps_all, checkpoint = config.domain_rl(domain).steps, max(steps(store), default=None)
    if state in ("failed", "stopped"):  # whoever resumes it wants to know where from
        try:
            sound = latest(store, config.digest, damaged.append)
            checkpoint = sound.progress.step if sound is not None else None
        except RunError as error:
            damaged.append(str(error))
    return DomainStatus(
        domain=domain,
        state=state,
        step=last.step if last else 0,
        steps=steps_all,
        reward=last.reward_mean if last else None,
        accuracy=last.accuracy if last else None,
        validation=next((row.validation for row in reversed(rows) if row.validation is not None), None),
        kl=last.kl if last else None,
        tokens_per_s=last.tokens_per_s if last else None,
        answer_tokens=last.answer_tokens if last else None,
        cut=last.cut if last else None,
        same_reward=last.same_reward if last else None,
        skipped=sum(row.skipped or 0 for row in rows),
        timeouts=sum(row.timeouts or 0 for row in rows),
        errors=sum(row.errors or 0 for row in rows),
        left_s=seconds_left(rows, steps_all) if state == "running" and rows else None,
        checkpoint=checkpoint,
        result=result,
        workers=alive if state == "running" else workers,
        trackers=tracks(store),
        fault=fault,
        damaged=tuple(damaged),
        notes=tuple(notes(store)),
    )
