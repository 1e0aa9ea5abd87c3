"""Answers of a form: ARC's questions without their choices, to be answered briefly, as JSON, or both (hub:
allenai/ai2_arc).

They are skills that a small instruct model can learn: a rule reads the form alone, and any answer of that form follows
it, whether it is true or not. `brief` and `json` are for training, `brief_json` asks for both at once, and `brief_20`
is another limit. One row: `{"question": "Which factor ...?"}`. No rows are shipped. The hub's three splits of ARC-Easy
are used as they are; a local file is split as GSM8K's is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2ray.core import Message, user
from t2ray.tasks import ifeval
from t2ray.tasks.files import read
from t2ray.tasks.gsm8k import split_rows
from t2ray.tasks.task import DataRow, Task
from t2ray.tasks.text import settled

HUB = "allenai/ai2_arc:ARC-Easy"


@dataclass(frozen=True)
class Form:
    """What a prompt asks for, and what an answer must look like: at most `words` words, as an object, or both."""

    wish: str
    words: int | None = None
    as_json: bool = False


FORMS = {
    "brief": Form("Answer in at most 12 words.", words=12),
    "brief_20": Form("Answer in at most 20 words.", words=20),
    "json": Form('Answer as JSON: {"answer": "..."}', as_json=True),
    "brief_json": Form('Answer in at most 12 words, as JSON: {"answer": "..."}', words=12, as_json=True),
}


def task(form: str, data: str | Sequence[str] | None = None) -> Task:
    """The task of answering in a form of `FORMS`, with questions from the hub or a local file with a column `question`.

    Raises:
        DataError: the local file cannot be read, or one of its rows has no question.
    """

    @functools.cache
    def splits() -> Mapping[str, list[DataRow]]:
        columns = {"question": str}
        if data is not None:
            return split_rows(_asked(read(data).need(columns).rows, form))
        parts = {split: _asked(read(HUB, split).need(columns).rows, form) for split in ("train", "validation", "test")}
        return parts | {"all": [row for part in parts.values() for row in part]}

    if data is not None:
        splits()
    return Task(
        name=form,
        rows=lambda split: splits()[split],
        messages=messages,
        reward="t2ray.tasks.forms:reward",
        gold=None,
        max_tokens=40 if FORMS[form].as_json else 32,
    )


brief = functools.partial(task, "brief")
brief_20 = functools.partial(task, "brief_20")
as_json = functools.partial(task, "json")
brief_json = functools.partial(task, "brief_json")


def _asked(rows: Sequence[Mapping[str, Any]], form: str) -> list[dict[str, Any]]:
    return [{"question": row["question"], "form": form} for row in rows]


def messages(row: DataRow) -> tuple[Message, ...]:
    """The prompt: the question, and the form of its answer."""
    return user(f"{row['question']}\n\n{FORMS[row['form']].wish}")


def reward(completion: str, row: Mapping[str, Any]) -> float:
    """+1 if the completion, after its reasoning, has the row's form, else -1.

    Words are counted as IFEval counts them, at least one and at most the limit. An object has the key `answer` alone,
    whose value is a text with at least one word; nothing stands around it, no fence of Markdown either.
    """
    form = FORMS[row["form"]]
    text = _value(settled(completion)) if form.as_json else completion
    rule = {"relation": "at most", "num_words": form.words} if form.words else {"relation": "at least", "num_words": 1}
    return ifeval.reward(text, {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [rule]})


def _value(text: str) -> str:
    """Returns the answer in an object with that key alone, or nothing."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    answer = value["answer"] if isinstance(value, dict) and [*value] == ["answer"] else ""
    return answer if isinstance(answer, str) else ""
