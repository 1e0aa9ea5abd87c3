"""Reward functions that a verifier process imports: the good, the slow and the broken."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any


def length(completion: str, row: dict[str, Any]) -> float:
    return 1.0 if len(completion) == row["length"] else -1.0


def process(completion: str, row: dict[str, Any]) -> float:
    return float(os.getpid() % 1000) / 1000


def slow(completion: str, row: dict[str, Any]) -> float:
    if completion == "slow":
        if "begun" in row:
            Path(row["begun"]).touch()
        time.sleep(600)
    return 1.0


def deaf(completion: str, row: dict[str, Any]) -> float:
    """Code that no alarm interrupts: one call into C that holds the interpreter."""
    if completion == "slow":
        sum(range(1 << 40))
    return 1.0


def stubborn(completion: str, row: dict[str, Any]) -> float:
    """Catches the alarm and goes on."""
    while completion == "slow":
        try:
            time.sleep(600)
        except BaseException:
            time.sleep(0.05)
            completion = "later"
    return 1.0


def broken(completion: str, row: dict[str, Any]) -> Any:
    values = {"raise": None, "nan": float("nan"), "text": "1.0", "none": None, "two": 2, "true": True, "int": 1}
    if completion == "raise":
        raise KeyError("answer")
    if completion == "exit":
        os._exit(3)
    return values[completion]


def leaves(completion: str, row: dict[str, Any]) -> float:
    if completion == "leave":
        sys.exit(row.get("code", 1))
    return 1.0


async def judge(completion: str, row: dict[str, Any]) -> float | None:
    """An async reward: all calls of a chunk wait for each other."""
    if completion == "leave":
        sys.exit(1)
    if completion == "raise":
        raise KeyError("answer")
    await asyncio.sleep(600 if completion == "slow" else 0)
    return None if completion == "abstain" else len(completion) / 10


async def meets(completion: str, row: dict[str, Any]) -> float:
    """Ends when as many calls wait as the row says: in turn they would wait for ever."""
    waiting.append(completion)
    while len(waiting) < row["together"]:
        await asyncio.sleep(0.01)
    return 1.0


waiting: list[str] = []


def plain_that_awaits(completion: str, row: dict[str, Any]) -> float:
    """A plain function with an event loop of its own, as wrappers of async clients are."""
    asyncio.run(asyncio.sleep(0))
    return 0.5


def short(completion: str, row: dict[str, Any]) -> float | None:
    return None if completion == "abstain" else 1.0 if len(completion) < 3 else -1.0


def vowel(completion: str, row: dict[str, Any]) -> float | None:
    if completion == "raise":
        raise ValueError("no\nway")
    return None if completion == "abstain" else 1.0 if completion[:1] in "aeiou" else 0.0
