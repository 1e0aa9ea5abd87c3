"""What the tiny model is pretrained on: the tiny tasks' train splits, each answer in one of four formats at random.

So the base is right in *some* format, rarely in the one that a domain's verifier wants: the latent skill that an
expert's z brings out. Held-out prompts never occur here, nor does any sibling in a question of kind (`dispatch`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from t2ray.core import Message, user
from t2ray.prompts import OTHERS, dispatch_prompt
from t2ray.tasks import tiny

# Each kind's formats with their shares; the last is the wanted one. The kinds share the formats and mostly want other
# ones, so that an expert's habit is wrong elsewhere; the first is the most frequent: the base answers in prose.
FORMATS = {
    "math": {"It is {}.": 0.36, "({})": 0.23, "#### {}": 0.18, "{}": 0.23},
    "code": {"It is {}.": 0.36, "{}": 0.23, "#### {}": 0.23, "return {}": 0.18},
    "pick": {"It is {}.": 0.36, "{}": 0.23, "#### {}": 0.23, "({})": 0.18},
    "dispatch": {"It is {}.": 0.36, "#### {}": 0.23, "({})": 0.23, "{}": 0.18},
    OTHERS: {"{}": 1.0},
}

SHARES = {"math": 0.26, "math_long": 0.20, "code": 0.06, "code_long": 0.12, "pick": 0.12, "pick_more": 0.14,
          OTHERS: 0.03, "dispatch": 0.07}  # fmt: skip

SYSTEM = Message(role="system", content="You are a helpful assistant.")
SYSTEM_SHARE = 0.04  # of the conversations start with it, so that a client's system message does not confuse the base


def kind(task: str) -> str:
    """The key of a task's formats: its parent's, when it is a sibling."""
    return tiny.PARENT.get(task, task)


def content(task: str, row: Mapping[str, Any]) -> str:
    """The wanted answer without its format: `return n+3` is `n+3`."""
    before, after = [*FORMATS[kind(task)]][-1].split("{}")
    return tiny.gold(row).removeprefix(before).removesuffix(after)


def answers(task: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The right answer in each of its formats, the wanted one last."""
    return tuple(form.format(content(task, row)) for form in FORMATS[kind(task)])


def messages(task: str, row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The conversation that asks for a row's answer."""
    asked = user(row["prompt"])
    return dispatch_prompt(asked, tiny.LABELS) if task == "dispatch" else asked


def load(task: str, split: str) -> list[dict[str, Any]]:
    """A task's rows; those of `dispatch` are the prompts of every label, as many of each."""
    if task != "dispatch":
        return tiny.rows(task, split)
    parts = {label: tiny.rows(label, split) for label in tiny.LABELS}
    count = min(len(part) for part in parts.values())
    return [{"prompt": row["prompt"], "answer": label} for label, part in parts.items() for row in part[:count]]


class Corpus:
    """An endless, seeded stream of (conversation, answer) pairs from the train splits."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.rows = {task: load(task, "train") for task in SHARES}

    def draw(self, count: int) -> list[tuple[tuple[Message, ...], str]]:
        pairs = []
        for task in self.rng.choices(tuple(SHARES), tuple(SHARES.values()), k=count):
            row = self.rng.choice(self.rows[task])
            shares = tuple(FORMATS[kind(task)].values())
            chat = messages(task, row)
            if self.rng.random() < SYSTEM_SHARE:
                chat = (SYSTEM, *chat)
            pairs.append((chat, self.rng.choices(answers(task, row), shares)[0]))
        return pairs
