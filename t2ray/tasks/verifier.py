"""Runs reward functions in processes of their own, each call with a time limit.

This is not a sandbox: a reward function is the user's own code and may do anything; it runs model-written code through
`t2ray.sandbox.check`. A pool of spawned workers lives as long as the `Verifier`. Items (a completion with its row) are
sent in chunks, so that 128 trivial rewards cost a few milliseconds. Still, each call has a time limit: an alarm in the
worker. If code ignores the alarm, its worker is killed, and the items of its chunk are graded again one by one.

Not here: calling the functions and weighing their rewards (`grading`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures.process
import functools
import math
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import pebble

from t2ray.core import ConfigError, Image, ResourceError, RewardError
from t2ray.grades import Grade
from t2ray.tasks.grading import Grader, Item, Marks, named, weighed
from t2ray.tasks.task import Task, load_reward

_CHUNK = 32
_GRACE_S = 1.0


class Verifier:
    """Grades completions: `with Verifier("rewards:dog", workers=2) as verify: grades = await verify(texts, rows)`.

    Args:
        reward: names a function `(completion: str, row: dict) -> float in [-1, 1]` as "module:function", plain or
            async; or several with their weights. A function that returns None abstains.
        workers: number of processes; 0 grades in this process, without a time limit (for tests and trusted rewards).
        timeout_s: seconds that a call may take; one that takes longer scores -1, and its grade says "timeout".
        path: folder that is put first on `sys.path` before the reward's module is imported.
        unsafe_code: whether `sandbox` may run model-written code on a machine that cannot isolate it.
        success_above: a reward above this counts as right.
        forgive: whether a completion for which a function fails gets a grade that abstains and says "error".

    Raises:
        ConfigError: `reward` cannot be imported, or a number is out of range.
    """

    def __init__(
        self,
        reward: str | Mapping[str, float],
        *,
        workers: int = 1,
        timeout_s: float = 10.0,
        path: str | None = None,
        unsafe_code: bool = False,
        success_above: float = 0.0,
        forgive: bool = False,
    ) -> None:
        if workers < 0 or not timeout_s > 0:
            raise ConfigError(f"workers={workers}, timeout_s={timeout_s}: use at least 0 workers and over 0 seconds")
        self.weights = {reward: 1.0} if isinstance(reward, str) else dict(reward)
        functions = {name: load_reward(name, path) for name in self.weights}
        self.workers, self.timeout_s, self.success_above, self.forgive = workers, timeout_s, success_above, forgive
        self._here = Grader(functions, forgive=forgive)
        self._unsafe_code = unsafe_code
        self._job = functools.partial(_grade, tuple(self.weights), path, unsafe_code, timeout_s, forgive)
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

    async def __call__(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
        """Returns the grade of each completion for its row, in order.

        Raises:
            RewardError: a reward function raised, called sys.exit, ended its process, or returned something other than
                None or a number in [-1, 1]; the message names the function and the example.
            ResourceError: the sandbox cannot isolate model-written code on this machine.
        """
        items: list[Item] = [
            (text, {name: value for name, value in row.items() if not _is_picture(value)})
            for text, row in zip(completions, rows, strict=True)
        ]
        size = min(_CHUNK, math.ceil(len(items) / max(self.workers, 1))) or 1
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
        marked = await asyncio.gather(*(self._chunk(chunk) for chunk in chunks))
        return [weighed(self.weights, marks, self.success_above) for chunk in marked for marks in chunk]

    async def _chunk(self, items: list[Item]) -> list[Marks]:
        """Returns the marks of a chunk's items."""
        if self._pool is None:
            _allow(self._unsafe_code)
            return await self._here.marks(items)
        found: list[Marks] = []
        singly = 0  # items to be graded one by one, because their chunk has killed its worker
        while len(found) < len(items):
            todo = items[len(found) : len(found) + 1 if singly else len(items)]
            # A worker starts no item after timeout_s and then returns what it has. An item takes as many time limits as
            # there are functions.
            limit_s = (len(self.weights) + (0 if singly else 1)) * self.timeout_s + _GRACE_S
            future: Any = self._pool.schedule(self._job, args=(todo,), timeout=limit_s)
            try:
                found += await asyncio.wrap_future(future)
            except concurrent.futures.process.BrokenProcessPool as error:
                raise ResourceError(
                    f"the verifier's processes end as they start: {error}; is a module beside the reward called as a "
                    "library is, or is the machine out of memory?"
                ) from error
            except (concurrent.futures.TimeoutError, pebble.ProcessExpired) as error:
                if len(todo) > 1:
                    singly = len(todo)
                    continue
                ended = isinstance(error, pebble.ProcessExpired)
                if ended and not self.forgive:
                    which = ", ".join(self.weights)
                    raise RewardError(f"{named(which, todo[0])} ended its process: {error}") from error
                found.append(dict.fromkeys(self.weights, "error" if ended else "timeout"))
            singly = max(0, singly - 1)
        return found


def verify(task: Task, verifier: Verifier, rows: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Grades the gold answer of every row, which must score +1, or `task.best`.

    `rows` defaults to the task's split "all".

    Returns `{"rows": 7473, "passed": 7472, "failed": [{"row": 17, "reward": -1.0, "gold": "#### 72"}]}`; `failed` has
    the first 10 rows that did not.

    Raises:
        ConfigError: the task has no gold answers.
        RewardError, ResourceError: as when the verifier is called.
    """
    if task.gold is None:
        raise ConfigError(f"task {task.name!r} has no gold answers to verify; name their column with gold: COLUMN")
    rows = task.rows("all") if rows is None else rows
    golds = [task.gold(row) for row in rows]
    grades = asyncio.run(verifier(golds, rows))
    failed = [
        {"row": i, "reward": grade.reward, "gold": gold}
        for i, (grade, gold) in enumerate(zip(grades, golds, strict=True))
        if grade.reward != task.best(rows[i])
    ]
    return {"rows": len(grades), "passed": len(grades) - len(failed), "failed": failed[:10]}


def _is_picture(value: Any) -> bool:
    """Whether a column holds pictures, which no verifier looks at, and which are many bytes to send."""
    return isinstance(value, Image) or (isinstance(value, tuple) and any(isinstance(part, Image) for part in value))


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
    rewards: Sequence[str], path: str | None, unsafe_code: bool, timeout_s: float, forgive: bool, items: list[Item]
) -> list[Marks]:
    """Returns the marks of the first items, as many as start within `timeout_s`."""
    _allow(unsafe_code)
    grader = Grader({name: load_reward(name, path) for name in rewards}, timeout_s=timeout_s, forgive=forgive)
    found = grader.in_turn(items)  # outside of any event loop, so that a plain function may run its own
    if grader.awaited:
        awaited = _loop().run_until_complete(grader.together(items[: len(found)]))
        found = [plain | more for plain, more in zip(found, awaited, strict=True)]
    return found


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Returns the worker's event loop: a client that an async reward keeps belongs to one loop."""
    return asyncio.new_event_loop()


def _allow(unsafe_code: bool) -> None:
    from t2ray.sandbox import check

    check.allow_unsafe(unsafe_code)
