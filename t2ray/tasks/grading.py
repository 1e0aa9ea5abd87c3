"""How completions are graded: reward functions are called, what they return is checked, and it is weighed into a grade.

Not here: the processes that this runs in and their end (`verifier`), and where functions come from (`task`).
"""

from __future__ import annotations

import asyncio
import inspect
import numbers
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from t2ray.core import RewardError, T2RayError
from t2ray.grades import Grade
from t2ray.tasks.task import Reward

TIMED_OUT = -1.0

Item = tuple[str, dict[str, Any]]
Mark = float | Literal["timeout", "error"] | None
"""What came of one call of a reward function: its reward, None where it abstained, or why there is none."""
Marks = dict[str, Mark]
"""The mark of each function by its name."""


class Grader:
    """Reward functions by their names.

    Args:
        timeout_s: seconds that a call may take; None for any time.
        forgive: whether a function that fails for an item is noted as an "error" instead of ending the run.
    """

    def __init__(self, functions: Mapping[str, Reward], *, timeout_s: float | None = None, forgive: bool = False):
        self.awaited = {name: function for name, function in functions.items() if _is_async(function)}
        self.plain = {name: function for name, function in functions.items() if name not in self.awaited}
        self.timeout_s, self.forgive = timeout_s, forgive

    async def marks(self, items: Sequence[Item]) -> list[Marks]:
        """Returns the marks of all functions for all items, in this process.

        Raises:
            RewardError: a function failed.
        """
        plain, awaited = self.in_turn(items), await self.together(items)
        return [a | b for a, b in zip(plain, awaited, strict=True)]

    def in_turn(self, items: Sequence[Item]) -> list[Marks]:
        """Returns the marks of the plain functions for the first items, as many as start within `timeout_s`.

        Raises:
            RewardError: a function failed.
        """
        start = time.monotonic()
        found: list[Marks] = []
        for item in items:
            found.append({name: self._call(name, function, item) for name, function in self.plain.items()})
            if self.timeout_s is not None and time.monotonic() - start > self.timeout_s:
                break
        return found

    async def together(self, items: Sequence[Item]) -> list[Marks]:
        """Returns the marks of the async functions; all items are awaited at once.

        Raises:
            RewardError: a function failed.
        """
        calls = [self._await(name, function, item) for item in items for name, function in self.awaited.items()]
        marks = await asyncio.gather(*calls, return_exceptions=True)  # else the others would go on unwatched
        for mark in marks:
            if isinstance(mark, BaseException):
                raise mark
        width = len(self.awaited)
        rows = [marks[i * width : (i + 1) * width] for i in range(len(items))]
        return [dict(zip(self.awaited, row, strict=True)) for row in rows]  # type: ignore[arg-type]

    def _call(self, name: str, function: Reward, item: Item) -> Mark:
        start = time.monotonic()
        try:
            with _alarm(self.timeout_s):
                value: object = function(*item)
        except _TimeUp:
            return "timeout"
        except T2RayError:
            raise
        except (Exception, SystemExit) as error:  # any failure of a user's function must name the function
            return self._failed(name, item, said(error), error)
        if self.timeout_s is not None and time.monotonic() - start > self.timeout_s:  # it caught the alarm
            return "timeout"
        return self._checked(name, item, value)

    async def _await(self, name: str, function: Any, item: Item) -> Mark:
        try:
            async with asyncio.timeout(self.timeout_s) as limit:
                value: object = await function(*item)
        except T2RayError:
            raise
        except (Exception, SystemExit) as error:
            return "timeout" if limit.expired() else self._failed(name, item, said(error), error)
        return self._checked(name, item, value)

    def _checked(self, name: str, item: Item, value: object) -> Mark:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not -1.0 <= float(value) <= 1.0:
            what = f"returned {value!r}; it must return a number in [-1, 1], or None to abstain"
            return self._failed(name, item, what, None)
        return float(value)

    def _failed(self, name: str, item: Item, what: str, cause: BaseException | None) -> Mark:
        if self.forgive:
            return "error"
        raise RewardError(f"{named(name, item)} {what}") from cause


def weighed(weights: Mapping[str, float], marks: Marks, above: float) -> Grade:
    """Returns the grade of a completion: the mean of its rewards by their weights.

    A function that abstains leaves the mean to the others. The grade abstains where all of them do, and where one
    failed.

    Args:
        weights: of each function, by its name; a negative one turns a reward into a penalty.
        above: a reward above this is right.
    """
    faults = [mark for mark in marks.values() if isinstance(mark, str)]
    fault: Literal["timeout", "error"] | None = "error" if "error" in faults else "timeout" if faults else None
    parts = {name: TIMED_OUT if mark == "timeout" else mark for name, mark in marks.items() if mark != "error"}
    rewards = {name: reward for name, reward in parts.items() if isinstance(reward, float)}
    whole = sum(abs(weights[name]) for name in rewards)
    reward = None
    if whole and fault != "error":
        mean = sum(weights[name] * reward for name, reward in rewards.items()) / whole
        reward = min(1.0, max(-1.0, mean))  # rounding may leave the range
    return Grade(
        reward=reward, right=reward is not None and reward > above, parts=rewards if len(weights) > 1 else {},
        fault=fault,
    )  # fmt: skip


def said(error: BaseException) -> str:
    """Returns what a function did that failed, in one line."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({'' if error.code is None else repr(error.code)})"
    return " ".join(f"raised {type(error).__name__}: {error}".split())


def named(name: str, item: Item) -> str:
    """Returns the beginning of an error about a function and an item."""
    completion, row = item
    return f"the reward function {name!r}, for the completion {completion[:80]!r} of the example {str(row)[:200]},"


def _is_async(function: Reward) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class _TimeUp(BaseException):
    """Raised by the alarm. It is no `Exception`, so that `except Exception` in a reward function does not catch it."""


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
