"""Runs reward functions in processes of their own, each call with a time limit.

This is not a sandbox: a reward function is the user's own code and may do anything; it runs model-written code through
`t2ray.sandbox.check`. A pool of spawned workers lives as long as the `Verifier`. Items (a completion with its row) are
sent in chunks, so that 128 trivial rewards cost a few milliseconds. Still, each item has a time limit: an alarm in the
worker. If code ignores the alarm, its worker is killed, and the items of its chunk are graded again one by one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import math
import multiprocessing
import numbers
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pebble

from t2ray.core import ConfigError, RewardError, T2RayError
from t2ray.tasks.task import Reward, Task, load_reward

TIMED_OUT = -1.0
_CHUNK = 32
_GRACE_S = 1.0

Item = tuple[str, dict[str, Any]]


class Verifier:
    """Grades completions: `with Verifier("rewards:dog", workers=2) as verify: rewards = await verify(texts, rows)`.

    Args:
        reward: names a function `(completion: str, row: dict) -> float in [-1, 1]` as "module:function".
        workers: number of processes; 0 grades in this process, without a time limit (for tests and trusted rewards).
        timeout_s: seconds that an item may take; an item that takes longer scores -1 and is counted in `timeouts`.
        path: folder that is put first on `sys.path` before the reward's module is imported.
        unsafe_code: whether `sandbox` may run model-written code on a machine that cannot isolate it.

    Raises:
        ConfigError: `reward` cannot be imported, or a number is out of range.
    """

    def __init__(
        self,
        reward: str,
        *,
        workers: int = 1,
        timeout_s: float = 10.0,
        path: str | None = None,
        unsafe_code: bool = False,
    ) -> None:
        if workers < 0 or not timeout_s > 0:
            raise ConfigError(f"workers={workers}, timeout_s={timeout_s}: use at least 0 workers and over 0 seconds")
        load_reward(reward, path)
        self.reward = reward
        self.workers = workers
        self.timeout_s = timeout_s
        self.timeouts = 0
        self._job = functools.partial(_grade, reward, path, unsafe_code, timeout_s if workers else None)
        context = multiprocessing.get_context("spawn")
        self._pool = pebble.ProcessPool(workers, initializer=_start, context=context) if workers else None

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers, also in the middle of an item."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    async def __call__(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Returns the reward of each completion for its row, in order.

        Raises:
            RewardError: the reward function raised, or returned something other than a number in [-1, 1]; the message
                names the function and the example.
            ResourceError: the sandbox cannot isolate model-written code on this machine.
        """
        items: list[Item] = [(text, dict(row)) for text, row in zip(completions, rows, strict=True)]
        size = min(_CHUNK, math.ceil(len(items) / max(self.workers, 1))) or 1
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
        graded = await asyncio.gather(*(self._chunk(chunk) for chunk in chunks))
        rewards = [reward for chunk in graded for reward in chunk]
        self.timeouts += rewards.count(None)
        return [TIMED_OUT if reward is None else reward for reward in rewards]

    async def _chunk(self, items: list[Item]) -> list[float | None]:
        """Returns the rewards of a chunk, None for an item that took too long."""
        if self._pool is None:
            return self._job(items)
        rewards: list[float | None] = []
        singly = 0  # items to be graded one by one, because their chunk has killed its worker
        while len(rewards) < len(items):
            todo = items[len(rewards) : len(rewards) + 1 if singly else len(items)]
            # A worker starts no item after timeout_s and then returns what it has: twice that is enough for a chunk.
            limit_s = (1 if singly else 2) * self.timeout_s + _GRACE_S
            future: Any = self._pool.schedule(self._job, args=(todo,), timeout=limit_s)
            try:
                rewards += await asyncio.wrap_future(future)
            except (concurrent.futures.TimeoutError, pebble.ProcessExpired) as error:
                if len(todo) > 1:
                    singly = len(todo)
                    continue
                if isinstance(error, pebble.ProcessExpired):
                    raise RewardError(f"{_named(self.reward, todo[0])} ended its process: {error}") from error
                rewards.append(None)
            singly = max(0, singly - 1)
        return rewards


def verify(task: Task, verifier: Verifier, rows: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Grades the gold answer of every row, which must score +1. `rows` defaults to the task's split "all".

    Returns `{"rows": 7473, "passed": 7472, "failed": [{"row": 17, "reward": -1.0, "gold": "#### 72"}]}`; `failed` has
    the first 10 rows that did not score +1.

    Raises:
        ConfigError: the task has no gold answers.
        RewardError, ResourceError: as when the verifier is called.
    """
    if task.gold is None:
        raise ConfigError(f"task {task.name!r} has no gold answers to verify; name their column with gold: COLUMN")
    rows = task.rows("all") if rows is None else rows
    golds = [task.gold(row) for row in rows]
    rewards = asyncio.run(verifier(golds, rows))
    failed = [
        {"row": i, "reward": reward, "gold": gold}
        for i, (reward, gold) in enumerate(zip(rewards, golds, strict=True))
        if reward != 1.0
    ]
    return {"rows": len(rewards), "passed": len(rewards) - len(failed), "failed": failed[:10]}


# ------------------------------------------------------------------------------------------------------- in the worker
# The sandbox is imported here: the process that trains does without it.


def _start() -> None:
    """Makes a new worker end together with its owner, however the owner ends, and at once on SIGTERM."""
    from t2ray.sandbox import jail

    jail.die_with_parent()
    owner = multiprocessing.parent_process()
    if owner is None or owner.pid != os.getppid():  # the owner has ended already
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for code that ignores signals


def _grade(
    reward: str, path: str | None, unsafe_code: bool, timeout_s: float | None, items: list[Item]
) -> list[float | None]:
    """Returns the rewards of the first items, as many as start within `timeout_s`; None for one that took too long."""
    from t2ray.sandbox import check

    check.allow_unsafe(unsafe_code)
    function = load_reward(reward, path)
    start = time.monotonic()
    rewards: list[float | None] = []
    for item in items:
        rewards.append(_grade_one(reward, function, timeout_s, item))
        if timeout_s is not None and time.monotonic() - start > timeout_s:
            break
    return rewards


class _TimeUp(BaseException):
    """Raised by the alarm. It is no `Exception`, so that `except Exception` in a reward function does not catch it."""


def _grade_one(name: str, function: Reward, timeout_s: float | None, item: Item) -> float | None:
    start = time.monotonic()
    try:
        with _alarm(timeout_s):
            value: object = function(*item)
    except _TimeUp:
        return None
    except T2RayError:
        raise
    except Exception as error:  # any error of a user's function stops the run, and must name the function
        raise RewardError(f"{_named(name, item)} raised {type(error).__name__}: {error}") from error
    if timeout_s is not None and time.monotonic() - start > timeout_s:  # it caught the alarm
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not -1.0 <= float(value) <= 1.0:
        raise RewardError(f"{_named(name, item)} returned {value!r}; it must return a number in [-1, 1]")
    return float(value)


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    """Raises `_TimeUp` in the block after `seconds`, and then every 0.2 s in case the block catches it."""
    if seconds is None:
        yield
        return

    def ring(*_: object) -> None:
        raise _TimeUp

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _named(reward: str, item: Item) -> str:
    completion, row = item
    return f"the reward function {reward!r}, for the completion {completion[:80]!r} of the example {str(row)[:200]},"
