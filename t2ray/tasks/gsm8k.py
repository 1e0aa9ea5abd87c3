"""GSM8K, grade-school maths (Cobbe et al. 2021; hub: openai/gsm8k, configuration main). No rows are shipped.

A row: `{"question": "Natalia sold clips to 48 of her ...", "answer": "... 48+24 = <<48+24=72>>72 ...\\n#### 72"}`.
As in the paper's code, the even rows of the hub's train split train and the odd ones validate; the hub's test split
tests. A local file is divided by row number: of every four rows the 1st and 3rd train, the 2nd validates and the 4th
tests.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from t2ray.core import Message, user
from t2ray.tasks.data import read
from t2ray.tasks.task import DataRow, Task

HUB = "openai/gsm8k:main"
COLUMNS = {"question": str, "answer": str}

# 72, -3, $1,200.50, .5; the minus of "10-5" is no sign, and "1,2" is two numbers.
_NUMBER = re.compile(r"(?:(?<![\d)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)


def task(data: str | None = None) -> Task:
    """The task, from the hub or from a local file of the same columns.

    Raises:
        DataError: the local file, or one of its rows, is not what is needed.
    """

    @functools.cache
    def splits() -> Mapping[str, list[DataRow]]:
        rows = read(data or HUB).need(COLUMNS).rows
        if data is not None:
            return quarters(rows)
        test = read(HUB, "test").need(COLUMNS).rows
        return {"train": [*rows[::2]], "validation": [*rows[1::2]], "test": [*test], "all": [*rows, *test]}

    if data is not None:
        splits()
    return Task(
        name="gsm8k",
        rows=lambda split: splits()[split],
        messages=messages,
        reward="t2ray.tasks.gsm8k:reward",
        gold=lambda row: str(row["answer"]),
        max_tokens=512,
    )


def quarters(rows: list[dict[str, Any]]) -> Mapping[str, list[DataRow]]:
    """How a local file without splits of its own is divided: half to train, a quarter each to validation and test."""
    parts: dict[str, list[DataRow]] = {"train": [*rows[::2]], "validation": [*rows[1::4]], "test": [*rows[3::4]]}
    return parts | {"all": [*rows]}


def messages(row: DataRow) -> tuple[Message, ...]:
    """The question, and the form that the answer must have."""
    return user(
        f"{row['question']}\n\nThink step by step, then end with the answer as a number in this form: #### <number>"
    )


def reward(completion: str, row: dict[str, Any]) -> float:
    """+1 when the completion's answer equals the row's, as numbers (72 = 72.0 = $72, 1,200 = 1200); else -1."""
    answer = extract(completion)
    return 1.0 if answer is not None and answer == extract(row["answer"]) else -1.0


def extract(text: str) -> Decimal | None:
    """The one number that a text gives as its answer.

    A text with `####` answers after it: each line that has the mark must hold exactly one number there, and all such
    lines the same one. A text without the mark answers with its last number, as the paper's evaluation reads it.
    """
    marked = [line.partition("####")[2] for line in text.splitlines() if "####" in line]
    if not marked:
        found = _NUMBER.findall(text)
        return _value(found[-1]) if found else None
    found = [_NUMBER.findall(answer) for answer in marked]
    if any(len(numbers) != 1 for numbers in found):
        return None
    values = {_value(numbers[0]) for numbers in found}
    return values.pop() if len(values) == 1 else None


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("$", ""))
