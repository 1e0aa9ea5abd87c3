"""What a verifier says of completions. Standard library only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from t2ray.core import Completion, Example

THINK = "<think>"
"""What opens the reasoning of most thinking models."""
THOUGHTS = {THINK: "</think>", "[THINK]": "[/THINK]"}
"""What opens reasoning, and what then closes it; the second is Mistral's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """What a verifier says of a completion: `Grade(reward=0.8, right=True)`.

    `reward` lies in [-1, 1]; it is None where the verifier abstains, and such a completion counts nowhere. `right` says
    whether the completion counts as right in an accuracy. `parts` has the reward of each function by its name, where a
    task weighs several. `fault` says that a function ran out of time, which is a reward of -1, or that it failed.
    """

    reward: float | None
    right: bool
    parts: Mapping[str, float] = field(default_factory=dict)
    fault: Literal["timeout", "error"] | None = None

    @classmethod
    def of(cls, reward: float | None, above: float = 0.0) -> Grade:
        """Returns the grade of a reward by itself; a reward above `above` is right."""
        return cls(reward=reward, right=reward is not None and reward > above)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A sampled completion of an example, with its grade."""

    example: Example
    completion: Completion
    grade: Grade

    @property
    def reward(self) -> float | None:
        """The reward in [-1, 1]; None where the verifier abstained."""
        return self.grade.reward


def for_verifier(completions: Sequence[Completion]) -> list[str]:
    """Returns what a verifier reads: the texts, with the tag of reasoning where the prompt has opened it."""
    return [THINK + completion.text if completion.thinking else completion.text for completion in completions]


Verify = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Awaitable[list[Grade]]]
"""`verify(completions, rows)`: the grade of each completion for its task row, in order."""
