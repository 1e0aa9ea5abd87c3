r"""MATH, competition mathematics (Hendrycks et al. 2021; hub: EleutherAI/hendrycks_math). No rows are shipped.

One row: `{"problem": "What is ...?", "solution": "... so the answer is $\\boxed{\\frac{1}{2}}$."}`, on the hub also
with `level` and `type`. The hub's rows have seven subjects. Of its train split, every 10th row is for validation; its
test split is for tests, as in the paper's code. A local file is split as GSM8K's is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from t2ray.core import DataError, Message, user
from t2ray.tasks import latex
from t2ray.tasks.files import read
from t2ray.tasks.gsm8k import split_rows
from t2ray.tasks.table import Table
from t2ray.tasks.task import DataRow, Task
from t2ray.tasks.text import settled

HUB = "EleutherAI/hendrycks_math"
SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
            "precalculus")  # fmt: skip
COLUMNS = {"problem": str, "solution": str}

_HOLD_OUT = 10
_MOST = 500  # characters of an answer
_SAID = re.compile(r"\banswer\b\**\s*(?:(?:is|equals|[:=])[\s*:]*)+", re.I)


def task(data: str | Sequence[str] | None = None) -> Task:
    """The task MATH, from the hub or from a local file with the same columns.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """

    @functools.cache
    def splits() -> Mapping[str, list[DataRow]]:
        if data is not None:
            return split_rows(_checked(read(data)))
        learn, test = (
            [row for subject in SUBJECTS for row in _checked(read(f"{HUB}:{subject}", split))]
            for split in ("train", "test")
        )
        held = learn[_HOLD_OUT - 1 :: _HOLD_OUT]
        train = [row for i, row in enumerate(learn) if i % _HOLD_OUT != _HOLD_OUT - 1]
        return {"train": [*train], "validation": [*held], "test": [*test], "all": [*learn, *test]}

    if data is not None:
        splits()
    return Task(
        name="competition_math",
        rows=lambda split: splits()[split],
        messages=messages,
        reward="t2ray.tasks.competition_math:reward",
        gold=lambda row: str(row["solution"]),
        max_tokens=1024,
        reading=lambda completion, row: extract(completion),
    )


def _checked(table: Table) -> list[dict[str, Any]]:
    for place, row in zip(table.places, table.need(COLUMNS).rows, strict=True):
        if not latex.boxed(row["solution"]):
            raise DataError(f"{place}: the solution boxes no answer; it must hold \\boxed{{...}}")
    return table.rows


def messages(row: DataRow) -> tuple[Message, ...]:
    """The prompt: the problem, and the form that the answer must have (as in the paper's code)."""
    return user(f"{row['problem']}\n\nSolve it by reasoning step by step, and put the final answer within \\boxed{{}}.")


def reward(completion: str, row: dict[str, Any]) -> float:
    """+1 if the completion's answer is that of the solution, up to how it is written (`latex.same`), else -1."""
    answer, gold = extract(completion), latex.boxed(row["solution"])
    return 1.0 if answer and gold and latex.same(answer, gold) else -1.0


def extract(completion: str) -> str | None:
    r"""Returns the answer of a text: what its last `\boxed{}` holds, or else what it says after "the answer is".

    It counts after the reasoning (`text.settled`). A box that is never closed answers nothing.
    """
    text = settled(completion)
    if re.search(r"\\(?:boxed|fbox)", text):
        return latex.boxed(text)
    said = [*_SAID.finditer(text)]
    if not said:
        return None
    answer = text[said[-1].end() :][:_MOST].partition("\n")[0]
    inside = re.match(r"\$([^$]*)\$|\\\((.*?)\\\)", answer)
    answer = (inside[1] or inside[2] or "") if inside else re.split(r"[.;](?:\s|$)|,? (?:because|since) ", answer)[0]
    return answer.strip(" *.") or None
