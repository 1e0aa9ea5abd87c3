"""Signs of life of a run's workers, and what went wrong: small files in each domain's folder, on whatever storage."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

import psutil

from t2ray.core import ResourceError
from t2ray.store import Store

WORKERS, FAULT = "workers", "fault.json"
BEAT_S = 2.0
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


def beats(store: Store) -> tuple[Beat, ...]:
    """The newest sign of life of each worker, by rank."""
    rows = [json.loads(store.read_text(f"{WORKERS}/{name}")) for name in store.names(WORKERS)]
    return tuple(sorted((Beat(**row) for row in rows), key=lambda worker: worker.rank))


def read_fault(store: Store) -> Fault | None:
    """What went wrong last in a domain's folder."""
    return Fault(**json.loads(store.read_text(FAULT))) if store.exists(FAULT) else None
