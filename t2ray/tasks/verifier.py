"""Runs reward functions in processes of their own, each call with a time limit. For rollouts, evaluation, `verify`.

Not a sandbox: a reward function is the user's own code and may do anything; model-written code goes from there through
`t2ray.sandbox.check`. A pool of spawned workers lives as long as the `Verifier`. Items travel in chunks, which keeps
the cost of a call of 128 trivial rewards at a few milliseconds, and yet each item has its own limit: an alarm inside
the worker; code that an alarm cannot interrupt is ended with its worker, and its chunk is graded again item by item.
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
from t2ray.sandbox import check as sandbox
from t2ray.sandbox import jail
from t2ray.tasks.task import Reward, Task, load_reward

TIMED_OUT = -1.0
_CHUNK = 32
_GRACE_S = 1.0

Item = tuple[str, dict[str, Any]]


class Verifier:
    """Grades completions: `with Verifier("rewards:dog", workers=2) as verify: rewards = await verify(texts, rows)`.

    Args:
        reward: "module:function", `(completion: str, row: dict) -> float in [-1, 1]`.
        workers: processes; 0 grades in this process, without a time limit (for tests and trusted rewards).
        timeout_s: seconds an item may take; beyond it the item scores -1 and `timeouts` counts it.
        path: folder that is put first on `sys.path` before the reward's module is imported.
        unsafe_code: whether `sandbox` may run model-written code where it cannot isolate it.

    Raises:
        ConfigError: `reward` names nothing that can be imported, or a number is out of range.
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
        """Ends the workers, also in the middle of an item."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    async def __call__(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """The reward of each completion for its row, in order.

        Raises:
            RewardError: a reward function raised, or returned no finite number in [-1, 1]; the function and the example
                are named.
            ResourceError: the sandbox cannot isolate model-written code here.
        """
        items: list[Item] = [(text, dict(row)) for text, row in zip(completions, rows, strict=True)]
        size = min(_CHUNK, math.ceil(len(items) / max(self.workers, 1))) or 1
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
        graded = await asyncio.gather(*(self._chunk(chunk) for chunk in chunks))
        rewards = [reward for chunk in graded for reward in chunk]
        self.timeouts += rewards.count(None)
        return [TIMED_OUT if reward is None else reward for reward in rewards]

    async def _chunk(self, items: list[Item]) -> list[float | None]:
        """The rewards of a chunk, None for an item that ran out of time."""
        if self._pool is None:
            return self._job(items)
        rewards: list[float | None] = []
        careful = 0  # items still to be graded alone, because the chunk they came in ended with its worker
        while len(rewards) < len(items):
            todo = items[len(rewards) : len(rewards) + 1 if careful else len(items)]
            # A worker hands back what it has once timeout_s has passed, and no item starts after: twice is enough.
            limit_s = (1 if careful else 2) * self.timeout_s + _GRACE_S
            future: Any = self._pool.schedule(self._job, args=(todo,), timeout=limit_s)
            try:
                rewards += await asyncio.wrap_future(future)
            except (concurrent.futures.TimeoutError, pebble.ProcessExpired) as error:
                if len(todo) > 1:
                    careful = len(todo)
                    continue
                if isinstance(error, pebble.ProcessExpired):
                    raise RewardError(f"{_named(self.reward, todo[0])} ended its process: {error}") from error
                rewards.append(None)
            careful = max(0, careful - 1)
        return rewards


def verify(task: Task, verifier: Verifier, rows: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Grades the gold answer of every row (of `rows`, else of the task's "all" split), before anybody spends GPU hours.

    Returns `{"rows": 7473, "passed": 7473, "failed": [{"row": 17, "reward": -1.0, "gold": "#### 72"}, ...]}`, `failed`
    holding the first 10 rows that did not score +1.

    Raises:
        ConfigError: the task has no gold answers.
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


def _start() -> None:
    """Ties a new worker to its owner: it ends when the owner does, however that ends, and at once when told to."""
    jail.die_with_parent()
    owner = multiprocessing.parent_process()
    if owner is None or owner.pid != os.getppid():  # it ended before it could be tied to
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for code that no signal interrupts


def _grade(
    reward: str, path: str | None, unsafe_code: bool, timeout_s: float | None, items: list[Item]
) -> list[float | None]:
    """The rewards of the first items, as many as start within `timeout_s`; None for one that took longer."""
    sandbox.allow_unsafe(unsafe_code)
    function = load_reward(reward, path)
    start = time.monotonic()
    rewards: list[float | None] = []
    for item in items:
        rewards.append(_grade_one(reward, function, timeout_s, item))
        if timeout_s is not None and time.monotonic() - start > timeout_s:
            break
    return rewards


class _TimeUp(BaseException):
    """No `Exception`, so that a reward function's own `except Exception` lets it through."""


def _grade_one(name: str, function: Reward, timeout_s: float | None, item: Item) -> float | None:
    start = time.monotonic()
    try:
        with _alarm(timeout_s):
            value: object = function(*item)
    except _TimeUp:
        return None
    except T2RayError:
        raise
    except Exception as error:  # whatever a user's function raises must stop the run, and say which function it was
        raise RewardError(f"{_named(name, item)} raised {type(error).__name__}: {error}") from error
    if timeout_s is not None and time.monotonic() - start > timeout_s:  # it caught the alarm and went on
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not -1.0 <= float(value) <= 1.0:
        raise RewardError(f"{_named(name, item)} returned {value!r}; it must return a number in [-1, 1]")
    return float(value)


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    """Raises `_TimeUp` in the block after `seconds`, and again and again should it be caught there."""
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
