"""Reward functions that a verifier process imports: the good, the slow and the broken."""

from __future__ import annotations

import os
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
