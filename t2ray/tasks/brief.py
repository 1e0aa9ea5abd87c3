"""Short answers: ARC's questions without their choices, to be answered in at most 12 words (hub: allenai/ai2_arc).

It is a skill of form that a small instruct model can learn: the rule is one of IFEval's, and any answer of up to 12
words follows it, whether it is true or not. One row: `{"question": "Which factor ...?"}`. No rows are shipped. The
hub's three splits of ARC-Easy are used as they are; a local file is split as GSM8K's is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from t2ray.core import Message, user
from t2ray.tasks import ifeval
from t2ray.tasks.files import read
from t2ray.tasks.gsm8k import split_rows
from t2ray.tasks.task import DataRow, Task

HUB = "allenai/ai2_arc:ARC-Easy"
LIMIT = 12

_RULE = {
    "instruction_id_list": ["length_constraints:number_words"],
    "kwargs": [{"relation": "at most", "num_words": LIMIT}],
}


def task(data: str | Sequence[str] | None = None) -> Task:
    """The task of short answers, with questions from the hub or from a local file with a column `question`.

    Raises:
        DataError: the local file cannot be read, or one of its rows has no question.
    """

    @functools.cache
    def splits() -> Mapping[str, list[DataRow]]:
        columns = {"question": str}
        if data is not None:
            return split_rows(read(data).need(columns).rows)
        parts: dict[str, list[DataRow]] = {
            split: [*read(HUB, split).need(columns).rows] for split in ("train", "validation", "test")
        }
        return parts | {"all": [row for part in parts.values() for row in part]}

    if data is not None:
        splits()
    return Task(
        name="brief",
        rows=lambda split: splits()[split],
        messages=messages,
        reward="t2ray.tasks.brief:reward",
        gold=None,
        max_tokens=32,
    )


def messages(row: DataRow) -> tuple[Message, ...]:
    """The prompt: the question, and the greatest number of words."""
    return user(f"{row['question']}\n\nAnswer in at most {LIMIT} words.")


def reward(completion: str, row: Mapping[str, Any]) -> float:
    """+1 if the completion has one to 12 words, else -1."""
    return ifeval.reward(completion, _RULE)
