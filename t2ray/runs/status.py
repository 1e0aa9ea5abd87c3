"""The status of a run, read from its folder alone: also while it runs, on any storage, from any machine. No ray."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Literal

from t2ray.config.train import TrainConfig
from t2ray.runs.heartbeat import Fault, Heartbeat, heartbeats, read_fault
from t2ray.store import Store
from t2ray.training.checkpoint import FOLDER as CHECKPOINTS
from t2ray.training.domain import Result, domain_store, finished
from t2ray.training.metrics import read_metrics, seconds_left
from t2ray.training.trackers import Track, tracks

STALE_S = 30.0  # a worker whose last heartbeat is older does not run any more


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainStatus:
    """One domain of a run. Figures are those of the newest step; `left_s` is estimated from the last ten steps."""

    domain: str
    state: Literal["waiting", "running", "done", "failed", "stopped"]
    step: int
    steps: int
    reward: float | None
    accuracy: float | None
    validation: float | None
    kl: float | None
    tokens_per_s: float | None
    left_s: float | None
    checkpoint: int | None
    result: Result | None
    workers: tuple[Heartbeat, ...]
    trackers: dict[str, Track]
    fault: Fault | None


def read_status(config: TrainConfig) -> list[DomainStatus]:
    """Returns the status of every domain of a run, in the job's order."""
    return [_domain(config, domain) for domain in config.domains]


def _domain(config: TrainConfig, domain: str) -> DomainStatus:
    store, now = domain_store(config, domain), time.time()
    rows, workers, result, fault = read_metrics(store), heartbeats(store), finished(store), read_fault(store)
    steps = config.domain_rl(domain).steps
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
        state = "stopped" if rows or workers else "waiting"
    return DomainStatus(
        domain=domain,
        state=state,
        step=last.step if last else 0,
        steps=steps,
        reward=last.reward_mean if last else None,
        accuracy=last.accuracy if last else None,
        validation=next((row.validation for row in reversed(rows) if row.validation is not None), None),
        kl=last.kl if last else None,
        tokens_per_s=last.tokens_per_s if last else None,
        left_s=seconds_left(rows, steps) if state == "running" and rows else None,
        checkpoint=_newest(store),
        result=result,
        workers=alive if state == "running" else workers,
        trackers=tracks(store),
        fault=fault,
    )


def _newest(store: Store) -> int | None:
    """The step of the newest checkpoint."""
    steps = [int(match[1]) for match in map(re.compile(r"step_(\d+)\.").match, store.names(CHECKPOINTS)) if match]
    return max(steps, default=None)
