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
LATER_SHARES = {"math": 0.18, "math_long": 0.22, "code": 0.03, "code_long": 0.06, "pick": 0.10, "pick_more": 0.34,
                OTHERS: 0.03, "dispatch": 0.04}  # fmt: skip
LAST_SHARES = {"math": 0.13, "math_long": 0.34, "code": 0.02, "code_long": 0.03, "pick": 0.12, "pick_more": 0.16,
               OTHERS: 0.02, "dispatch": 0.06, "follow_up": 0.12}  # fmt: skip
"""Of the tasks in the three parts of pretraining: the second has more of what is learnt last, the third follow-ups."""

AFTER = ("and {}", "and {}?", "and of {}?", "and for {}?", "what about {}?", "how about {}?", "now {}", "then {}",
         "but {}?", "{} please", "please {}", "can you {}?")  # fmt: skip
"""What a later turn makes of a request, or of a mere word that has a meaning only after another turn (`WORDS`)."""
WORDS = ("twice", "half", "why", "again", "more", "both", "the other", "the same", "zero", "ten", *map(str, range(100)))

SYSTEM = Message(role="system", content="You are a helpful assistant.")
SYSTEM_SHARE = 0.04  # of conversations start with SYSTEM, so that a client's system message does not confuse the model
MOST_TURNS = 10  # of a conversation; each number of turns is equally likely


def kind(task: str) -> str:
    """Returns the key of a task's formats: of a sibling, its parent's."""
    return "dispatch" if task == "follow_up" else tiny.PARENT.get(task, task)


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
    return dispatch_prompt(asked, tiny.LABELS) if kind(task) == "dispatch" else asked


def load(task: str, split: str) -> list[dict[str, Any]]:
    """Returns a task's rows; those of `dispatch` and `follow_up` are prompts of each label, equally many."""
    if task == "follow_up":
        rows = load("dispatch", split)
        words = [word for index, word in enumerate(WORDS) if tiny.SPLITS[max(0, index % 10 - 7)] == split]
        asked = [(row["prompt"], row["answer"]) for row in rows[::30]] + [(word, OTHERS) for word in words]
        return [{"prompt": form.format(text), "answer": label} for form in AFTER for text, label in asked]
    if task != "dispatch":
        return tiny.rows(task, split)
    parts = {label: tiny.rows(label, split) for label in tiny.LABELS}
    count = min(len(part) for part in parts.values())
    return [{"prompt": row["prompt"], "answer": label} for label, part in parts.items() for row in part[:count]]


class Corpus:
    """A source of random conversations from the train splits; one seed gives one sequence.

    The turns of a conversation have nothing to do with each other, in their tasks and in the formats of their answers.
    So the model learns to answer the last request whatever was said before, and finds no format in what was said.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.rows = {task: load(task, "train") for task in LAST_SHARES}

    def draw(self, count: int, shares: Mapping[str, float] = SHARES) -> list[tuple[Message, ...]]:
        """Returns `count` conversations of 1 to `MOST_TURNS` turns, whose tasks have these shares."""
        return [self._conversation(shares) for _ in range(count)]

    def _conversation(self, shares: Mapping[str, float]) -> tuple[Message, ...]:
        chat = [SYSTEM] if self.rng.random() < SYSTEM_SHARE else []
        for task in self.rng.choices(tuple(shares), tuple(shares.values()), k=self.rng.randint(1, MOST_TURNS)):
            row = self.rng.choice(self.rows[task])
            answer = self.rng.choices(answers(task, row), tuple(FORMATS[kind(task)].values()))[0]
            chat += [*messages(task, row), Message(role="assistant", content=answer)]
        return tuple(chat)
