"""The classification domain, made from other tasks' prompts: which kind of request is this? (paper section 3.2, b)

Not here: how a served request is dispatched (`adapt.strategies`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t2ray.core import ConfigError, Message
from t2ray.prompts import OTHERS, dispatch_prompt
from t2ray.tasks.task import DataRow, Task

_MOST = 5_000  # prompts per label


def dispatch(tasks: Sequence[Task], others: Task) -> Task:
    """Returns the task of naming a prompt's task. Its labels are the names of `tasks`, and "others".

    The labels take turns in a split, and all have as many prompts as the one with the fewest (at most 5,000). A row is
    `{"messages": [{"role", "content"}, ...], "label": "math", "labels": ["math", ..., "others"]}`.

    Raises:
        ConfigError: `tasks` is empty, or two of them have one name.
    """
    labels = [*(task.name for task in tasks), OTHERS]
    if not tasks or len(set(labels)) != len(labels):
        raise ConfigError(f"the classification domain needs other domains of different names, not {labels[:-1]}")

    def rows(split: str) -> list[DataRow]:
        columns = [_labelled(task, label, labels, split) for task, label in zip((*tasks, others), labels, strict=True)]
        return [row for turn in zip(*columns, strict=False) for row in turn]

    return Task(
        name="dispatch", rows=rows, messages=_messages, reward="t2ray.tasks.dispatch:reward", gold=_gold, max_tokens=8,
        choices=lambda row: row["labels"],
    )  # fmt: skip


def _labelled(task: Task, label: str, labels: list[str], split: str) -> list[DataRow]:
    return [
        {
            "messages": [{"role": message.role, "content": message.text} for message in example.messages],
            "label": label,
            "labels": labels,
        }
        for example in task.examples(split, _MOST)
    ]


def _messages(row: DataRow) -> tuple[Message, ...]:
    return dispatch_prompt(tuple(Message(**message) for message in row["messages"]), tuple(row["labels"]))


def _gold(row: DataRow) -> str:
    return str(row["label"])


def reward(completion: str, row: dict[str, Any]) -> float:
    """+1 if the completion is the label and nothing else but white space around it, else -1."""
    return 1.0 if completion.strip() == row["label"] else -1.0
