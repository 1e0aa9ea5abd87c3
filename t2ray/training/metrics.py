"""The figures of a training step: one line of `metrics.jsonl`, and what records, trackers, status and displays read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from t2ray.store import Store

METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One step's figures, over the rollouts of all workers.

    `reward_mean` lies in [-1, 1]; `accuracy` is the share of rollouts with a positive reward; `kl` is nats per token to
    the base model; `loss` is per rollout; `grad_norm` is before clipping; `z_min` and `z_max` bound the expert after
    the step; `tokens_per_s` counts sampled tokens; `validation` is the greedy accuracy, None where it was not measured.
    """

    step: int
    reward_mean: float
    accuracy: float
    kl: float
    loss: float
    grad_norm: float
    z_min: float
    z_max: float
    tokens_per_s: float
    seconds: float
    validation: float | None = None

    def row(self) -> dict[str, Any]:
        """The figures by name, without a validation that was not made."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def values(self) -> dict[str, float]:
        """What a tracker draws over the steps: `row` without the step's number."""
        return {key: value for key, value in self.row().items() if key != "step"}


def read_metrics(store: Store) -> list[StepMetrics]:
    """The figures of the steps so far, in a domain's folder; a last line that a kill cut short is left out."""
    if not store.exists(METRICS):
        return []
    lines = store.read_text(METRICS).split("\n")
    return [StepMetrics(**json.loads(line)) for line in lines[:-1]]


def as_lines(rows: Iterable[StepMetrics]) -> str:
    """The file's text: a JSON object per line."""
    return "".join(json.dumps(row.row()) + "\n" for row in rows)


def seconds_left(rows: list[StepMetrics], steps: int) -> float:
    """The time that the rest of `steps` takes at the pace of the last ten steps; `rows` has at least one."""
    recent = rows[-10:]
    return (steps - rows[-1].step) * sum(row.seconds for row in recent) / len(recent)
