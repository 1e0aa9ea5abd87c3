"""What the tiny model is pretrained on: the tiny tasks' train splits, with each answer in a random one of its formats.

So the base model is right in *some* format, and rarely in the one that a domain's verifier wants. An expert's z brings
out this latent skill. Held-out prompts do not occur, and no sibling task occurs in a classification question.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from t2ray.core import Message, user
from t2ray.prompts import OTHERS, dispatch_prompt
from t2ray.tasks import tiny

# The formats of each kind of task with their shares; the last is the wanted one. The kinds share the formats and want
# different ones, so that an expert's format is wrong elsewhere. The first is the most frequent: the base model answers
# in prose.
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
SYSTEM_SHARE = 0.04  # of conversations start with SYSTEM, so that a client's system message does not confuse the model


def kind(task: str) -> str:
    """Returns the key of a task's formats: of a sibling, its parent's."""
    return tiny.PARENT.get(task, task)


def content(task: str, row: Mapping[str, Any]) -> str:
    """Returns the wanted answer without its format: `n+3` of `return n+3`."""
    before, after = [*FORMATS[kind(task)]][-1].split("{}")
    return tiny.gold(row).removeprefix(before).removesuffix(after)


def answers(task: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the right answer in each of its formats, the wanted format last."""
    return tuple(form.format(content(task, row)) for form in FORMATS[kind(task)])


def messages(task: str, row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Returns the conversation that asks for a row's answer."""
    asked = user(row["prompt"])
    return dispatch_prompt(asked, tiny.LABELS) if task == "dispatch" else asked


def load(task: str, split: str) -> list[dict[str, Any]]:
    """Returns a task's rows; those of `dispatch` are prompts of each label, equally many."""
    if task != "dispatch":
        return tiny.rows(task, split)
    parts = {label: tiny.rows(label, split) for label in tiny.LABELS}
    count = min(len(part) for part in parts.values())
    return [{"prompt": row["prompt"], "answer": label} for label, part in parts.items() for row in part[:count]]


class Corpus:
    """A source of random (conversation, answer) pairs from the train splits; one seed gives one sequence."""

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
