"""A lease on a run's folder: one driver at a time trains it, on a local disk and on shared storage alike.

A lease has a number, which is a folder that one driver alone can make (`Store.claim`); the highest number holds. Its
`driver.json` says who holds it and changes every two seconds. One whose process is dead, or which has not changed for
half a minute, is taken over by the next number, and its driver, if it was only asleep, sees that and ends.
"""

from __future__ import annotations

import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

import psutil

from t2ray.core import ResourceError, RunError
from t2ray.integrity import Damaged, seal, unseal
from t2ray.store import Store

LEASES = "driver"
BEAT_S = 2.0
STALE_S = 30.0
_POLL_S = 0.5
_FIRST_S = 5.0  # from a claim to the first beat


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """Who holds a lease. `machine` tells machines and containers apart that have one name; `beats` counts."""

    host: str
    pid: int
    started: float
    machine: str
    beats: int = 0
    ended: bool = False


class Lease:
    """A lease that this process holds; a thread of its own keeps it."""

    def __init__(self, store: Store, number: int) -> None:
        self.store, self.number, self.lost = store, number, False
        self.driver = Driver(
            host=socket.gethostname(), pid=os.getpid(), started=psutil.Process().create_time(), machine=_machine()
        )
        self._end = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises RunError if another driver has taken the run over."""
        if self.lost:
            raise RunError(
                f"another driver has taken over {self.store.uri}, since this one gave no sign of life for "
                f"{STALE_S:.0f} s; leave the run to it"
            )

    def end(self) -> None:
        """Gives the lease back."""
        self._end.set()
        self._thread.join()
        if not self.lost and self.store.exists(_path(self.number)):
            self.driver = replace(self.driver, ended=True)
            with suppress(ResourceError):  # it is stale soon
                self._write()

    def _keep(self) -> None:
        while not self._end.wait(BEAT_S):
            with suppress(ResourceError):  # a full disk will end the run at its records, with a better message
                self.lost = max(_numbers(self.store), default=0) > self.number
                if self.lost:
                    return
                self.driver = replace(self.driver, beats=self.driver.beats + 1)
                self._write()

    def _write(self) -> None:
        self.store.write_text(_path(self.number), seal(asdict(self.driver)))


@contextmanager
def lease(folder: str, *, wait_s: float = 0.0) -> Iterator[Lease]:
    """Holds a run's or a sweep's folder for the block.

    Args:
        wait_s: how long to wait for another driver that is about to end.

    Raises:
        RunError: another driver holds it; with its host and process.
    """
    held = _acquire(Store(folder), time.monotonic() + wait_s)
    try:
        yield held
    finally:
        held.end()


def _acquire(store: Store, deadline: float) -> Lease:
    while True:
        number = max(_numbers(store), default=0)
        other = _holder(store, number) if number else None
        if other is not None:
            if time.monotonic() < deadline:
                time.sleep(_POLL_S)
                continue
            raise RunError(
                f"{store.uri} is trained by another driver: process {other.pid} on {other.host}; wait until it ends, "
                "or end it and go on with --resume"
            )
        if not store.claim(f"{LEASES}/{number + 1:06d}"):
            time.sleep(random.SystemRandom().random())  # two at once: on an object store both may have failed
            continue
        held = Lease(store, number + 1)
        earlier = [n for n in _numbers(store) if n < held.number]
        if max(_numbers(store)) == held.number:
            for n in earlier:
                with suppress(OSError, ResourceError):  # another has deleted it
                    store.delete(f"{LEASES}/{n:06d}")
            return held
        held.end()


def _holder(store: Store, number: int) -> Driver | None:
    """Returns the living driver that holds a lease; waits where nothing else tells whether it lives."""
    began, first = time.monotonic(), None
    while True:
        now = _read(store, number)
        first = first or now
        waited = time.monotonic() - began
        if now is None:
            if first is not None or waited > _FIRST_S + random.SystemRandom().random():
                return None
        elif now.ended:
            return None
        elif now.machine == _machine():
            return now if _runs(now) else None
        elif first is not None and now.beats != first.beats:
            return now
        elif waited > STALE_S or store.age_s(_path(number)) > STALE_S:
            return None
        time.sleep(_POLL_S)


def _runs(driver: Driver) -> bool:
    """Whether a process of this machine lives; a later one of the same number is another."""
    try:
        process = psutil.Process(driver.pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - driver.started) < 2
    except psutil.NoSuchProcess:
        return False


def _machine() -> str:
    """Returns what the processes of this machine have in common: its last start, and the namespace of their numbers."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _read(store: Store, number: int) -> Driver | None:
    try:
        return Driver(**unseal(store.read_bytes(_path(number))))
    except (FileNotFoundError, Damaged, TypeError):
        return None


def _numbers(store: Store) -> list[int]:
    return [int(name) for name in store.names(LEASES) if re.fullmatch(r"\d{6,}", name)]


def _path(number: int) -> str:
    return f"{LEASES}/{number:06d}/driver.json"
