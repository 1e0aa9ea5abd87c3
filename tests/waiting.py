"""Waiting for a state, never for seconds; and the processes that a test has started, never those of the machine.

A machine with other work is slower, and no test may fail by it. So nothing here measures: `GUARD_S` ends a wait that
would never end, and every process is a descendant of one that the test holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import psutil

GUARD_S = 300.0
"""Seconds after which a wait is taken for a hang. Also for the timeouts of clients and of child processes."""


def wait_until(true: Callable[[], object], what: str, *, unless: tuple[type[Exception], ...] = ()) -> None:
    """Returns as soon as `true()` holds; an exception of the kinds in `unless` counts as not yet.

    Raises:
        AssertionError: it does not come to hold; `what` says in words what was waited for.
    """
    end = time.monotonic() + GUARD_S
    while True:
        try:
            if true():
                return
        except unless:
            pass
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def family(pid: int) -> list[psutil.Process]:
    """All descendants of a process; none when it has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def lives(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie does not, and neither does another process that was given its number."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_all(processes: Iterable[psutil.Process]) -> None:
    """Kills those that still run, and returns when they have ended."""
    processes = list(processes)
    for process in processes:
        if lives(process):
            process.kill()
    wait_until(lambda: not any(map(lives, processes)), "the end of processes that were killed")
