"""What a training says of itself in its folder, for records, trackers, status and displays: the figures of each step, a
line of `metrics.jsonl`; and notes about files that were found damaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from t2ray.integrity import Damaged, seal, unseal
from t2ray.store import Store

METRICS, NOTES = "metrics.jsonl", "notes.jsonl"


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

    @property
    def not_finite(self) -> dict[str, float]:
        """The figures that are no finite numbers."""
        return {key: value for key, value in self.values.items() if not math.isfinite(value)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadMetrics:
    """A domain's figures as they can be read: the rows that are sound, and a line about each that is not."""

    rows: list[StepMetrics]
    damage: list[str]


def read_metrics(store: Store) -> list[StepMetrics]:
    """The figures of the steps so far, in a domain's folder, without those that are damaged."""
    return check_metrics(store).rows


def check_metrics(store: Store) -> ReadMetrics:
    """The figures of the steps so far, and what is damaged. A last line that a kill cut short is neither."""
    found = ReadMetrics(rows=[], damage=[])
    try:
        lines = store.read_bytes(METRICS).split(b"\n")
    except FileNotFoundError:
        return found
    except Damaged as error:
        found.damage.append(f"{METRICS}: {error}")
        return found
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = StepMetrics(**unseal(line))
            if not all(isinstance(value, int | float) for value in row.row().values()):
                raise Damaged("a figure is no number")
            found.rows.append(row)
        except (Damaged, TypeError) as error:
            what = error if isinstance(error, Damaged) else "its keys are not those of a step"
            found.damage.append(f"{METRICS}, line {number}: {what}")
    return found


def as_lines(rows: Iterable[StepMetrics]) -> str:
    """The file's text: a JSON object per line, with a digest of its figures."""
    return "".join(seal(row.row()) + "\n" for row in rows)


def seconds_left(rows: list[StepMetrics], steps: int) -> float:
    """The time that the rest of `steps` takes at the pace of the last ten steps; `rows` has at least one."""
    recent = rows[-10:]
    return (steps - rows[-1].step) * sum(row.seconds for row in recent) / len(recent)


def notes(store: Store) -> list[str]:
    """The notes in a domain's folder, the oldest first."""
    lines = store.read_bytes(NOTES).splitlines() if store.exists(NOTES) and not store.is_folder(NOTES) else []
    found = []
    for line in lines:
        try:
            found.append(str(unseal(line)["note"]))
        except (Damaged, KeyError):
            continue  # a note is for people alone
    return found


def note(store: Store, text: str) -> None:
    """Adds a note, unless it is there already."""
    before = notes(store)
    if text not in before and not store.is_folder(NOTES):
        store.write_text(NOTES, "".join(seal({"note": line}) + "\n" for line in [*before, text]))
