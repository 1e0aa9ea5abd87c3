"""What is counted of a batch of rollouts: sums over a share, which add up to those of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from t2ray.grades import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Sums over rollouts.

    `reward` and `right` are over the `graded` ones, those for which the verifier did not abstain. `tokens` are those of
    all `answers`, of which `cut` reached their greatest length. Calls of reward functions made `timeouts` and
    `errors`. Of the `prompts` with several graded samples, `alike` have one reward for all of them. `parts` has the sum
    and the number of the rewards of each function, where a task weighs several.
    """

    reward: float = 0.0
    right: float = 0.0
    graded: float = 0.0
    answers: float = 0.0
    tokens: float = 0.0
    cut: float = 0.0
    timeouts: float = 0.0
    errors: float = 0.0
    prompts: float = 0.0
    alike: float = 0.0
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Any]:
        """The figures of `StepMetrics` that are shares and means of these sums."""
        return {
            "reward_mean": self.reward / self.graded if self.graded else None,
            "accuracy": self.right / self.graded if self.graded else None,
            "answer_tokens": self.tokens / max(self.answers, 1.0),
            "cut": self.cut / max(self.answers, 1.0),
            "same_reward": self.alike / self.prompts if self.prompts else None,
            "abstained": int(self.answers - self.graded),
            "rewards": {name: total / number for name, (total, number) in self.parts.items() if number},
        }


_SUMS = tuple(one.name for one in fields(Counts) if one.name != "parts")


def counted(rollouts: Sequence[Rollout], samples: int, rewards: Sequence[str]) -> Tensor:
    """Returns the sums of a share as numbers, float64, which `Counts` of several shares are added up from.

    Args:
        rollouts: `samples` of a prompt stand side by side.
        rewards: the names of the reward functions, where a task weighs several.
    """
    groups = [rollouts[start : start + samples] for start in range(0, len(rollouts), samples)]
    sets = [[r.reward for r in group if r.reward is not None] for group in groups]
    several = [rewards for rewards in sets if len(rewards) > 1]
    graded = [r.reward for r in rollouts if r.reward is not None]
    sums = Counts(
        reward=sum(graded),
        right=sum(r.grade.right for r in rollouts),
        graded=len(graded),
        answers=len(rollouts),
        tokens=sum(len(r.completion.tokens) for r in rollouts),
        cut=sum(r.completion.finish_reason == "length" for r in rollouts),
        timeouts=sum(r.grade.fault == "timeout" for r in rollouts),
        errors=sum(r.grade.fault == "error" for r in rollouts),
        prompts=len(several),
        alike=sum(min(rewards) == max(rewards) for rewards in several),
    )
    parts = [[r.grade.parts[name] for r in rollouts if name in r.grade.parts] for name in rewards]
    numbers = [float(getattr(sums, name)) for name in _SUMS]
    numbers += [number for part in parts for number in (sum(part), float(len(part)))]
    return torch.tensor(numbers, dtype=torch.float64)


def as_counts(sums: Tensor, rewards: Sequence[str]) -> Counts:
    """Returns the counts of a batch from the sums of its shares."""
    numbers = sums.tolist()
    own, parts = numbers[: len(_SUMS)], numbers[len(_SUMS) :]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return Counts(**dict(zip(_SUMS, own, strict=True)), parts=dict(zip(rewards, pairs, strict=True)))
