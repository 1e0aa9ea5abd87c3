"""Heartbeats of a run's workers, and its last faults: small files in each domain's folder, on any storage."""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TypeVar

import psutil

from t2ray.core import ResourceError
from t2ray.integrity import Damaged, seal, unseal
from t2ray.store import Store

WORKERS, FAULT = "workers", "fault.json"
BEAT_S = 2.0
_GIB = 2**30
_Sign = TypeVar("_Sign", "Heartbeat", "Fault")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A worker's sign of life: `Heartbeat(rank=0, host="node3", pid=811, step=12, at=1.7e9, rss_gib=9.1, ...)`.

    `rss_gib` is the memory of the process; the whole machine uses `used_gib` of `total_gib`. `began` is the time of the
    worker's first heartbeat. Times are in seconds since 1970.
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
    """The last fault of a domain: `Fault(at=1.7e9, message="...", ended=False)`; after `ended`, it did not go on."""

    at: float
    message: str
    ended: bool


def start_heartbeat(store: Store, rank: int) -> Callable[[int], None]:
    """Starts to write a heartbeat into the run folder every two seconds. Call what it returns with each step's number.

    A thread of its own writes, because a large model's first step takes minutes, and because a machine's memory is
    fullest in the middle of a step. The thread ends with the thread that called this, or when the returned object is
    deleted.
    """
    return _HeartbeatWriter(store, rank)


class _HeartbeatWriter:
    def __init__(self, store: Store, rank: int) -> None:
        self.store, self.rank, self.step, self.began = store, rank, 0, time.time()
        self.beat()
        threading.Thread(target=_write_while_alive, args=(weakref.ref(self), threading.current_thread())).start()

    def __call__(self, step: int) -> None:
        self.step = step

    def beat(self) -> None:
        """Writes a heartbeat."""
        machine = psutil.virtual_memory()
        here = Heartbeat(
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
        self.store.write_text(f"{WORKERS}/{self.rank}.json", seal(asdict(here)))


def _write_while_alive(writer: weakref.ref[_HeartbeatWriter], owner: threading.Thread) -> None:
    while owner.is_alive() and (mine := writer()) is not None:
        with suppress(ResourceError):  # a full disk will end the run at its records, with a better message
            mine.beat()
        del mine
        owner.join(BEAT_S)


def note_fault(store: Store, message: str, *, ended: bool) -> None:
    """Notes a fault in a domain's folder, in place of an earlier one."""
    store.write_text(FAULT, seal(asdict(Fault(at=time.time(), message=message, ended=ended))))


def heartbeats(store: Store) -> tuple[Heartbeat, ...]:
    """Returns the newest heartbeat of each worker, by rank."""
    found = (_read(store, f"{WORKERS}/{name}", Heartbeat) for name in store.names(WORKERS))
    return tuple(sorted((worker for worker in found if worker is not None), key=lambda worker: worker.rank))


def read_fault(store: Store) -> Fault | None:
    """Returns the last fault of a domain, or None if there was none."""
    return _read(store, FAULT, Fault)


def _read(store: Store, path: str, kind: type[_Sign]) -> _Sign | None:
    """What a file holds; None where there is none or it is damaged, since the next one replaces it."""
    try:
        return kind(**unseal(store.read_bytes(path)))
    except (FileNotFoundError, Damaged, TypeError):
        return None
