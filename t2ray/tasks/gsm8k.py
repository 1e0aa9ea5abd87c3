"""GSM8K, grade-school maths (Cobbe et al. 2021; hub: openai/gsm8k, configuration main). No rows are shipped.

One row: `{"question": "Natalia sold clips to 48 of her ...", "answer": "... 48+24 = <<48+24=72>>72 ...\\n#### 72"}`.
As in the paper's code, the even rows of the hub's train split are for training and the odd ones for validation; the
hub's test split is for tests. A local file is split by row number: of every four rows, the 1st and 3rd are for
training, the 2nd for validation and the 4th for tests.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from t2ray.core import Message, user
from t2ray.tasks.files import read
from t2ray.tasks.number import last, numbers, only
from t2ray.tasks.task import DataRow, Task
from t2ray.tasks.text import boxed, plain, settled

HUB = "openai/gsm8k:main"
COLUMNS = {"question": str, "answer": str}

_HEADING = re.compile(
    r"[^\w√<>≠.-]*(?:(?!(?:the |final |my )*answer|[a-z]\s*=|about|approx|minus|negative)[a-z]|\d+[.):]\s+[a-z])", re.I
)
_SAID = re.compile(r"\banswer\b(?:\s*(?:is|equals|(?:would|must|should|will) be|comes to|[:=]))+\s*", re.I)
_MOST = 500  # characters of an answer
_REASON = re.compile(r"[.!?](?:\s|$)|\b(?:because|since)\b", re.I)


def task(data: str | Sequence[str] | None = None) -> Task:
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
        reading=lambda completion, row: None if (number := extract(completion)) is None else str(number),
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


def extract(completion: str) -> Fraction | None:
    r"""Returns the one number that a text answers with, or None if it gives none or several.

    It counts after the reasoning (`text.settled`). The first of these that a text has holds its answer:

    1. the mark `####` before a number ("#### 72 clips"); all such lines must state the same number. A heading ("####
       Step 1: add", "#### 1. Add") is no answer, and a last line with a mark and no number answers nothing;
    2. LaTeX's box, the last one (`\boxed{72}`);
    3. "the answer is 72", "Answer: 72", the last one;
    4. the last line with a number, or else the last number, as in the paper's evaluation.
    """
    text = plain(settled(completion))
    marked, lines = [], [line for line in text.splitlines() if line.strip()]
    for i, line in enumerate(lines):
        _, mark, answer = line.partition("####")
        if not mark:
            continue
        at_end = i + 1 == len(lines)
        if not answer.strip(" #") and not at_end:
            answer = lines[i + 1]
        if not re.search(r"\d", answer, re.ASCII):
            if at_end:
                return None
        elif not _HEADING.match(answer):
            marked.append(only(answer))
    if marked:
        return marked[0] if len({*marked}) == 1 else None
    if boxes := boxed(text):
        return only(boxes[-1])
    said = [text[match.end() :][:_MOST].partition("\n")[0] for match in _SAID.finditer(text)]
    said = [answer for answer in said if numbers(answer)]
    return only(_REASON.split(said[-1])[0]) if said else last(text)
