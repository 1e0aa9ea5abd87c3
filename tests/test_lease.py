"""One driver at a time trains a run: on one machine, on several, on shared storage; a dead one is followed at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from pyarrow import fs
from waiting import GUARD_S, wait_until

from t2ray.core import RunError
from t2ray.integrity import seal, unseal
from t2ray.runs import lease as leases
from t2ray.runs.lease import LEASES, Driver, lease
from t2ray.store import Store

FILE = f"{LEASES}/000001/driver.json"
ELSEWHERE = Driver(host="node7", pid=811, started=0.0, machine="another one")


@pytest.fixture(params=["local", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A run's folder; `lease` opens it, wherever it lies."""
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    monkeypatch.setattr(leases, "_POLL_S", 0.05)
    monkeypatch.setattr(leases, "_FIRST_S", 0.2)
    found = Store(tmp_path) if request.param == "local" else Store("bucket/run", fs._MockFileSystem())
    monkeypatch.setattr(leases, "Store", lambda folder: found)
    return found


def held_by(store: Store, driver: Driver, number: int = 1) -> None:
    assert store.claim(f"{LEASES}/{number:06d}")
    store.write_text(f"{LEASES}/{number:06d}/driver.json", seal(asdict(driver)))


@pytest.fixture
def beating(store: Store) -> Iterator[None]:
    """A driver on another machine that goes on."""
    end = threading.Event()
    held_by(store, ELSEWHERE)

    def beat() -> None:
        for beats in range(1, 10_000):
            store.write_text(FILE, seal(asdict(replace(ELSEWHERE, beats=beats))))
            if end.wait(0.05):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    end.set()
    thread.join()


def no_wait(seconds: float) -> None:
    raise AssertionError("nothing need be waited for to see this")


def test_a_second_driver_is_refused_at_once_until_the_first_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=time.monotonic, sleep=no_wait))
    with lease("run"):  # noqa: SIM117 (the second is tried while the first is held)
        with pytest.raises(RunError, match=f"by another driver: process {os.getpid()} on .*; wait until it ends, or"):
            lease("run").__enter__()
    with lease("run"):
        pass
    assert store.names(LEASES) == ["000002"]


def test_one_waits_for_a_driver_that_is_about_to_end(store: Store) -> None:
    first = lease("run")
    first.__enter__()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(lambda: lease("run", wait_s=GUARD_S).__enter__())
        wait_until(lambda: not second.done(), "a second driver that waits")
        first.__exit__(None, None, None)
        second.result().end()


def test_a_dead_process_of_this_machine_is_followed_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with process:
        other = Driver(host="here", pid=process.pid, started=psutil.Process(process.pid).create_time(),
                       machine=leases._machine())  # fmt: skip
        held_by(store, other)
        with pytest.raises(RunError, match=f"process {process.pid} on here"):
            lease("run").__enter__()
        process.kill()
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, "its end")
        with lease("run"):
            pass
    store.write_text(f"{LEASES}/000009/driver.json", seal(asdict(replace(other, pid=os.getpid(), started=1.0))))
    with lease("run"):  # the number of the process is another's now
        pass


def test_a_driver_elsewhere_that_goes_on_is_not_taken_over(store: Store, beating: None) -> None:
    with pytest.raises(RunError, match="process 811 on node7"):
        lease("run").__enter__()


def test_a_driver_elsewhere_that_has_stopped_is_taken_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "STALE_S", 0.4)
    begun = time.monotonic()
    held_by(store, ELSEWHERE)
    with lease("run"):
        assert time.monotonic() - begun >= 0.4


def test_one_that_stopped_long_ago_by_the_storages_clock_is_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    held_by(store, ELSEWHERE)
    os.utime(tmp_path / FILE, (time.time() - 40, time.time() - 40))
    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=time.monotonic, sleep=no_wait))
    with lease(str(tmp_path)):
        assert store.names(LEASES) == ["000002"]


@pytest.mark.parametrize("data", [None, b"", b"\xff", b"{}"])
def test_a_claim_that_came_to_no_sound_file_is_passed_over(store: Store, data: bytes | None) -> None:
    assert store.claim(f"{LEASES}/000001")
    if data is not None:
        store.write_bytes(FILE, data)
    with lease("run"):
        assert "000002" in store.names(LEASES)


def test_of_many_at_once_one_gets_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # However long one takes from its claim to its first beat. On an object store two that claim at once may both fail,
    # and then all wait for a beat that never comes.
    monkeypatch.setattr(leases, "_FIRST_S", GUARD_S if store.local is not None else 5.0)

    def attempt(_: int) -> bool:
        try:
            held.append(lease("run"))
            held[-1].__enter__()
            return True
        except RunError:
            return False

    held: list[object] = []
    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(attempt, range(6))) == 1


def test_a_driver_that_slept_and_was_taken_over_sees_it(store: Store) -> None:
    with lease("run") as held:
        held.check()
        held_by(store, ELSEWHERE, 2)
        wait_until(lambda: held.lost, "the loss of the lease")
        with pytest.raises(RunError, match="another driver has taken over"):
            held.check()
    assert Driver(**unseal(store.read_bytes(f"{LEASES}/000002/driver.json"))) == ELSEWHERE
