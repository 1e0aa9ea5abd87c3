"""GSM8K, grade-school maths (Cobbe et al. 2021; hub: openai/gsm8k, configuration main). No rows are shipped.

One row: `{"question": "Natalia sold clips to 48 of her ...", "answer": "... 48+24 = <<48+24=72>>72 ...\\n#### 72"}`.
As in the paper's code, the even rows of the hub's train split are for training and the odd ones for validation; the
hub's test split is for tests. A local file is split by row number: of every four rows, the 1st and 3rd are for
training, the 2nd for validation and the 4th for tests.
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

# Matches 72, -3, $1,200.50, .5. The minus of "10-5" is no sign, and "1,2" is two numbers.
_NUMBER = re.compile(r"(?:(?<![\d)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)


def task(data: str | None = None) -> Task:
    """The task GSM8K, from the hub or from a local file with the same columns.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """

    @functools.cache
    def splits() -> Mapping[str, list[DataRow]]:
        rows = read(data or HUB).need(COLUMNS).rows
        if data is not None:
            return split_rows(rows)
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


def split_rows(rows: list[dict[str, Any]]) -> Mapping[str, list[DataRow]]:
    """Splits the rows of a local file: half for training, a quarter each for validation and tests."""
    parts: dict[str, list[DataRow]] = {"train": [*rows[::2]], "validation": [*rows[1::4]], "test": [*rows[3::4]]}
    return parts | {"all": [*rows]}


def messages(row: DataRow) -> tuple[Message, ...]:
    """The prompt: the question, and the form that the answer must have."""
    return user(
        f"{row['question']}\n\nThink step by step, then end with the answer as a number in this form: #### <number>"
    )


def reward(completion: str, row: dict[str, Any]) -> float:
    """+1 if the completion's answer and the row's are the same number (72 = 72.0 = $72, 1,200 = 1200), else -1."""
    answer = extract(completion)
    return 1.0 if answer is not None and answer == extract(row["answer"]) else -1.0


def extract(text: str) -> Decimal | None:
    """Returns the one number that a text answers with, or None if it gives none or several.

    In a text with the mark `####`, the answer follows the mark: each line with a mark must have exactly one number
    after it, and all such lines the same one. In a text without a mark the last number is the answer, as in the paper's
    evaluation.
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
