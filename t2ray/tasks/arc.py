"""ARC-Easy and ARC-Challenge, science multiple choice (Clark et al. 2018; hub: allenai/ai2_arc). No rows are shipped.

One row: `{"question": "Which factor ...?", "choices": {"text": ["a leg ...", ...], "label": ["A", "B", "C", "D"]},
"answerKey": "B"}`. Some rows have the labels 1 to 4, some have three or five choices. The hub's three splits are used
as they are; a local file is split as GSM8K's is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from t2ray.core import DataError, Message, user
from t2ray.tasks.data import Table, read
from t2ray.tasks.gsm8k import split_rows
from t2ray.tasks.task import DataRow, Task

HUB = "allenai/ai2_arc"
COLUMNS = {"question": str, "choices": dict, "answerKey": str}


def easy(data: str | None = None) -> Task:
    """The task ARC-Easy, from the hub or from a local file with the same columns.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """
    return _task("arc_easy", f"{HUB}:ARC-Easy", data)


def challenge(data: str | None = None) -> Task:
    """The task ARC-Challenge, from the hub or from a local file with the same columns.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """
    return _task("arc_challenge", f"{HUB}:ARC-Challenge", data)


def _task(name: str, hub: str, data: str | None) -> Task:
    @functools.cache
    def splits() -> Mapping[str, list[DataRow]]:
        if data is not None:
            return split_rows(_checked(read(data)))
        parts: dict[str, list[DataRow]] = {
            split: [*_checked(read(hub, split))] for split in ("train", "validation", "test")
        }
        return parts | {"all": [row for part in parts.values() for row in part]}

    if data is not None:
        splits()
    return Task(
        name=name,
        rows=lambda split: splits()[split],
        messages=messages,
        reward="t2ray.tasks.arc:reward",
        gold=lambda row: str(row["answerKey"]),
        max_tokens=32,
    )


def _checked(table: Table) -> list[dict[str, Any]]:
    table.need(COLUMNS)
    for place, row in zip(table.places, table.rows, strict=True):
        labels, texts = row["choices"].get("label"), row["choices"].get("text")
        if not labels or not texts or len(labels) != len(texts) or row["answerKey"] not in labels:
            raise DataError(
                f'{table.source}, {place}: choices must be {{"text": [...], "label": [...]}} of equal lengths, '
                f"with the answerKey {row['answerKey']!r} among the labels"
            )
    return table.rows


def messages(row: DataRow) -> tuple[Message, ...]:
    """The prompt: the question, its labelled choices, and the form that the answer must have."""
    choices = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
    lines = "\n".join(f"{label}. {text}" for label, text in choices)
    return user(f"{row['question']}\n\n{lines}\n\nAnswer with the label of the right choice alone.")


def reward(completion: str, row: dict[str, Any]) -> float:
    """+1 if the completion gives the right label as its one answer, else -1."""
    return 1.0 if extract(completion, row["choices"]["label"]) == row["answerKey"] else -1.0


def extract(text: str, labels: list[str]) -> str | None:
    """Returns the one label that a text answers with, or None if it gives none or several.

    "The answer is B." and "Answer: (B)" count anywhere in the text, if all of them agree. Without them, the text must
    begin with the label, alone on its line ("B", "(B)") or before its choice ("B. sunlight", "B) sunlight"), and no
    later line may begin so with another label. "A or B" is no answer, nor is prose that merely has a letter ("A plant
    needs").
    """
    label = "(?:" + "|".join(map(re.escape, labels)) + ")"
    ends = r"(?=[.,:;)]|\s*$)"
    several = re.compile(rf"{label}[\s.,:;)]*(?:/|or\b|and\b)?\s*\(?{label}{ends}", re.MULTILINE)
    found = list(re.finditer(rf"(?i:\banswer(?: is:?|:))\s*\(?({label}){ends}", text, re.MULTILINE))
    if not found:
        begun = re.compile(rf"[ \t]*\(?({label})(?:[.:)]|\s*$)", re.MULTILINE)
        text = text.strip()
        if not begun.match(text):
            return None
        found = [
            match for start in re.finditer(r"^", text, re.MULTILINE) if (match := begun.match(text, start.start()))
        ]
    if any(several.match(text, match.start(1)) for match in found):
        return None
    said = {match[1] for match in found}
    return said.pop() if len(said) == 1 else None
