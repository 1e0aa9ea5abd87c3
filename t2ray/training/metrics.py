"""What a training says of itself in its folder, for records, trackers, status and displays.

The figures of each step are a line of `metrics.jsonl`. Notes are lines for people: alarms, and files that were damaged.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from t2ray.integrity import Damaged, seal, unseal
from t2ray.store import Store

METRICS, NOTES = "metrics.jsonl", "notes.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """The figures of one step, over the rollouts of all workers.

    `reward_mean` lies in [-1, 1]; `accuracy` is the share of rollouts that are right; both are None where the verifier
    abstained from all. `kl` is nats per token to the base model; `loss` is per rollout; `grad_norm` is before clipping;
    `z_min` and `z_max` bound the expert after the step; `tokens_per_s` counts sampled tokens. `validation` is the
    greedy accuracy, None where it was not measured.

    `answer_tokens` is the mean length of an answer. `cut` is the share of answers that reached their greatest length.
    `same_reward` is the share of prompts whose samples all have one reward, None for one sample per prompt. `abstained`
    counts rollouts that left the batch; `timeouts` and `errors` count answers for which a reward function ran out of
    time or failed, those of validations since the step before included. `skipped` is 1 for a step that had no signal
    and left z as it was. `rewards` has the mean of each reward function, where the task weighs several. `importance` is
    the mean of the tokens' importance weights before they are cut and `importance_cut` the share that is, where another
    program samples than trains. `numbers` are trained; `peak_gib` is the most memory that a worker has had so far, of
    its GPUs where it has any. Rows of earlier versions lack what this paragraph names.
    """

    step: int
    kl: float
    loss: float
    grad_norm: float
    z_min: float
    z_max: float
    tokens_per_s: float
    seconds: float
    reward_mean: float | None = None
    accuracy: float | None = None
    validation: float | None = None
    answer_tokens: float | None = None
    cut: float | None = None
    same_reward: float | None = None
    abstained: int | None = None
    timeouts: int | None = None
    errors: int | None = None
    skipped: int | None = None
    importance: float | None = None
    importance_cut: float | None = None
    numbers: int | None = None
    peak_gib: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Returns the figures by name, without those that there are not."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}

    @property
    def values(self) -> dict[str, float]:
        """What a tracker draws over the steps: numbers by name, such as `kl` and `reward/rewards.short`."""
        flat = {key: value for key, value in self.row().items() if key not in ("step", "rewards")}
        return flat | {f"reward/{name.replace(':', '.')}": mean for name, mean in self.rewards.items()}

    @property
    def not_finite(self) -> dict[str, float]:
        """The figures that are no finite numbers."""
        return {key: value for key, value in self.values.items() if not math.isfinite(value)}


ReportStep = Callable[[str, StepMetrics], None]
"""Is told of steps, with the domain of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadMetrics:
    """The figures of a domain as they can be read: the rows that are sound, and a line about each that is not."""

    rows: list[StepMetrics]
    damage: list[str]


def read_metrics(store: Store) -> list[StepMetrics]:
    """Returns the figures of the steps so far in a domain's folder, without those that are damaged."""
    return check_metrics(store).rows


def check_metrics(store: Store) -> ReadMetrics:
    """Returns the figures of the steps so far, and what is damaged. A last line that a kill cut short is neither."""
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
            if not all(isinstance(value, int | float) for value in (row.step, *row.values.values())):
                raise Damaged("a figure is no number")
            found.rows.append(row)
        except (Damaged, TypeError, AttributeError) as error:
            what = error if isinstance(error, Damaged) else "its keys are not those of a step"
            found.damage.append(f"{METRICS}, line {number}: {what}")
    return found


def as_lines(rows: Iterable[StepMetrics]) -> str:
    """Returns the text of the file: a JSON object per line, with a digest of its figures."""
    return "".join(seal(row.row()) + "\n" for row in rows)


def seconds_left(rows: list[StepMetrics], steps: int) -> float:
    """Returns the time that the rest of `steps` takes at the pace of the last ten steps; `rows` has at least one."""
    recent = rows[-10:]
    return (steps - rows[-1].step) * sum(row.seconds for row in recent) / len(recent)


def notes(store: Store) -> list[str]:
    """Returns the notes in a domain's folder, the oldest first."""
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


def peak_gib() -> float:
    """Returns the most memory that this process has had so far, in GiB: of its GPUs, where it has any, else its own."""
    import torch  # who reads figures needs none

    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**30
    # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
