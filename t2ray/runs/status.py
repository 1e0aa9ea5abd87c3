"""How a run stands, read from its folder alone: while it runs, on whatever storage, from whichever machine.

Workers leave signs of life there (`heart`), and what goes wrong is noted (`note_fault`); the rest is what training
writes anyway. Called by `cluster.train`, which writes, and `t2ray status`, which reads. No ray.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import psutil

from t2ray.config.train import TrainConfig
from t2ray.core import ResourceError
from t2ray.store import Store
from t2ray.training.checkpoint import FOLDER as CHECKPOINTS
from t2ray.training.domain import Result, domain_store, finished
from t2ray.training.records import read_metrics
from t2ray.training.trackers import Track, tracks

WORKERS, FAULT = "workers", "fault.json"
BEAT_S = 2.0
STALE_S = 30.0  # a worker that has said nothing for so long is not running
_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """A worker's sign of life: `Beat(rank=0, host="node3", pid=811, step=12, at=1.7e9, rss_gib=9.1, ...)`.

    `rss_gib` is the process's memory, `used_gib` of `total_gib` the whole machine's; the worker's heart `began` then.
    """

    rank: int
    host: str
    pid: int
    step: int
    at: float
    rss_gib: float
    used_gib: float
    total_gib: float
    began: float = 0.0

    @property
    def memory(self) -> str:
        return f"the worker held {self.rss_gib:.1f} GiB, the machine {self.used_gib:.1f} of {self.total_gib:.1f} GiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What went wrong last: `Fault(at=1.7e9, message="...", ended=False)`; `ended`: the run did not go on by itself."""

    at: float
    message: str
    ended: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainStatus:
    """One domain of a run. Figures are the newest step's; `left_s` is at the pace of the last ten steps."""

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
    workers: tuple[Beat, ...]
    trackers: dict[str, Track]
    fault: Fault | None


# ------------------------------------------------------------------------------------------------------------- writing


def heart(store: Store, rank: int) -> Callable[[int], None]:
    """A worker's heart: call it with each step; it leaves a sign of life in the run folder every two seconds.

    A thread of its own does that, since a large model's first step takes minutes, and since a machine is fullest in the
    middle of a step. It ends when the thread that made the heart ends, or lets go of it.
    """
    return _Heart(store, rank)


class _Heart:
    def __init__(self, store: Store, rank: int) -> None:
        self.store, self.rank, self.step, self.began = store, rank, 0, time.time()
        self.beat()
        threading.Thread(target=_beat_on, args=(weakref.ref(self), threading.current_thread())).start()

    def __call__(self, step: int) -> None:
        self.step = step

    def beat(self) -> None:
        """Leaves a sign of life."""
        machine = psutil.virtual_memory()
        here = Beat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=self.step,
            at=time.time(),
            rss_gib=psutil.Process().memory_info().rss / _GIB,
            used_gib=(machine.total - machine.available) / _GIB,
            total_gib=machine.total / _GIB,
            began=self.began,
        )
        self.store.write_text(f"{WORKERS}/{self.rank}.json", json.dumps(asdict(here)))


def _beat_on(heart: weakref.ref[_Heart], owner: threading.Thread) -> None:
    while owner.is_alive() and (mine := heart()) is not None:
        with suppress(ResourceError):  # a disk that is full ends the run where it writes its records, with more to say
            mine.beat()
        del mine
        owner.join(BEAT_S)


def note_fault(store: Store, message: str, *, ended: bool) -> None:
    """Notes what went wrong, in place of what was noted before."""
    store.write_text(FAULT, json.dumps(asdict(Fault(at=time.time(), message=message, ended=ended))))


# ------------------------------------------------------------------------------------------------------------- reading


def beats(store: Store) -> tuple[Beat, ...]:
    """The newest sign of life of each worker, by rank."""
    rows = [json.loads(store.read_text(f"{WORKERS}/{name}")) for name in store.names(WORKERS)]
    return tuple(sorted((Beat(**row) for row in rows), key=lambda worker: worker.rank))


def read_status(config: TrainConfig) -> list[DomainStatus]:
    """Every domain of a run, in the job's order."""
    return [_domain(config, domain) for domain in config.domains]


def _domain(config: TrainConfig, domain: str) -> DomainStatus:
    store, now = domain_store(config, domain), time.time()
    rows, workers, result = read_metrics(store), beats(store), finished(store)
    fault = Fault(**json.loads(store.read_text(FAULT))) if store.exists(FAULT) else None
    steps = config.domain_rl(domain).steps
    last: dict[str, Any] = rows[-1] if rows else {}
    recent = rows[-10:]
    pace_s = sum(row["seconds"] for row in recent) / max(1, len(recent))
    alive = [worker for worker in workers if now - worker.at < STALE_S]
    began = max((worker.began for worker in workers), default=0.0)
    names = [match for match in map(re.compile(r"step_(\d+)\.").match, store.names(CHECKPOINTS)) if match]
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
        step=last.get("step", 0),
        steps=steps,
        reward=last.get("reward_mean"),
        accuracy=last.get("accuracy"),
        validation=next((row["validation"] for row in reversed(rows) if "validation" in row), None),
        kl=last.get("kl"),
        tokens_per_s=last.get("tokens_per_s"),
        left_s=(steps - last["step"]) * pace_s if state == "running" and rows else None,
        checkpoint=int(names[-1][1]) if names else None,
        result=result,
        workers=tuple(alive) if state == "running" else workers,
        trackers=tracks(store),
        fault=fault,
    )
