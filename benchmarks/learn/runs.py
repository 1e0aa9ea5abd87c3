"""Rounds: in each, every side trains once from the base, and the sides take turns step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.learn.settings import Setting, job
from benchmarks.learn.turns import STEP
from t2ray.config.train import TrainConfig
from t2ray.core import ResourceError

ROOT = Path(__file__).parents[2]


@dataclass(slots=True, kw_only=True)
class SideRun:
    """One run of a side: what it was given, how many numbers it trains, and the figures of its steps."""

    side: str
    rate: float
    seed: int
    numbers: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    fixed_kl: float | None = None

    def learnt(self, setting: Setting) -> int | None:
        """Returns the step after which the setting's target is reached, or None."""
        right = [step["right"] for step in self.steps]
        for end in range(setting.window, len(right) + 1):
            if fmean(right[end - setting.window : end]) >= setting.target:
                return end
        return None


def one_round(
    setting: Setting, config: TrainConfig, pythons: Mapping[str, str], number: int, seed: int, folder: Path
) -> list[SideRun]:
    """Trains every side with the `number`th of its learning rates, until it has learnt or its steps are made.

    Args:
        pythons: the interpreter of each side.

    Raises:
        ResourceError: the process of a side ended, or it read other prompts than the first side.
    """
    with ExitStack() as stack:
        runs, lines = [], {}
        for side, python in pythons.items():
            runs.append(SideRun(side=side, rate=setting.rates[side][number], seed=seed))
            made = job(config, side, runs[-1].rate, seed, folder)
            (path := folder / f"{side}.json").write_text(json.dumps(made), encoding="utf-8")
            lines[side] = stack.enter_context(_process(python, side, path))
        for run in runs:
            run.numbers = lines[run.side].read()["numbers"]
        rows: dict[str, list[Any]] = {}
        for _ in range(config.rl.steps):
            for run in (run for run in runs if run.learnt(setting) is None):
                reply = lines[run.side].ask(STEP)
                made = reply.pop("rows")
                run.steps.append(reply)
                if len(run.steps) == 1:
                    rows[run.side] = made
        _same_prompts(rows)
        for run in runs:
            run.fixed_kl = lines[run.side].ask(next(iter(rows.values())))["kl"]
    return runs


class _Line:
    """The line to the process of a side."""

    def __init__(self, side: str, process: subprocess.Popen[str], errors: Path) -> None:
        self.side, self.process, self.errors = side, process, errors

    def ask(self, what: object) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            last = self.errors.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise ResourceError(f"the process of {self.side} ended: {' '.join(last) or 'it said nothing'}")
        return dict(json.loads(line))


@contextmanager
def _process(python: str, side: str, path: Path) -> Iterator[_Line]:
    module = "ours" if side == "t2ray" else "theirs"
    errors = path.with_suffix(".log")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (
        errors.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            [python, "-m", f"benchmarks.learn.{module}", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, text=True, env=environment,
        ) as process,
    ):  # fmt: skip
        try:
            yield _Line(side, process, errors)
        finally:
            process.kill()


def _same_prompts(rows: Mapping[str, Sequence[Any]]) -> None:
    """Raises ResourceError unless all sides read the same tokens of the first step's prompts, in the same order."""
    first, *others = rows
    for other in others:
        for one, two in zip(rows[first], rows[other], strict=True):
            if one[0] != two[0]:
                raise ResourceError(f"{other} and {first} read different prompts: {two[0]} and {one[0]}")


def pythons(trl: str | None, sides: Sequence[str]) -> dict[str, str]:
    """Returns the interpreter of each side: this one for t2ray, `trl` for TRL's."""
    return {side: sys.executable if side == "t2ray" else str(trl) for side in sides}
