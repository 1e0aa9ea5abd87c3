"""MBPP+, MBPP's sanitised problems with many more tests (Liu et al. 2023; hub: evalplus/mbppplus). No rows are shipped.

One row: `{"task_id": 2, "prompt": "Write a function ...", "code": "def similar ...", "test_imports": [], "test_list":
["assert similar(...) == ..."], "test": "inputs = ...\\nresults = ...\\nfor ...: assertion(...)"}`. The prompt shows
`test_list`; `test` decides. As in MBPP, the rows 11 to 510 are for tests; of those from 601 on, every second one is for
training and the others for validation. Completions run in `sandbox`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from t2ray.core import DataError, Message
from t2ray.tasks import mbpp
from t2ray.tasks.files import read
from t2ray.tasks.humaneval import NUMPY
from t2ray.tasks.table import Table
from t2ray.tasks.task import DataRow, Task

HUB = "evalplus/mbppplus"
COLUMNS = {"task_id": int, "prompt": str, "code": str, "test_imports": list, "test_list": list, "test": str}


def task(data: str | Sequence[str] | None = None) -> Task:
    """The task MBPP+, from the hub or from a local file with the same columns.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """

    @functools.cache
    def splits() -> Mapping[str, list[DataRow]]:
        rows: list[DataRow] = [*_checked(read(data) if data is not None else read(HUB, "test"))]
        rows.sort(key=lambda row: int(row["task_id"]))
        learn = [row for row in rows if row["task_id"] > 600]
        test = [row for row in rows if 10 < row["task_id"] <= 510]
        return {"train": learn[::2], "validation": learn[1::2], "test": test, "all": rows}

    if data is not None:
        splits()
    return Task(
        name="mbpp_plus",
        rows=lambda split: splits()[split],
        messages=messages,
        reward="t2ray.tasks.mbpp_plus:reward",
        gold=lambda row: str(row["code"]),
        max_tokens=512,
    )


def _checked(table: Table) -> list[dict[str, Any]]:
    for place, row in zip(table.places, table.need(COLUMNS).rows, strict=True):
        try:
            mbpp.interface(_as_mbpp(row))
        except (SyntaxError, TypeError) as error:
            raise DataError(f"{place}: the code or the test is no Python: {error}") from None
    return table.rows


def _as_mbpp(row: DataRow) -> dict[str, Any]:
    """Returns the row with MBPP's columns."""
    test = row["test"].replace("import numpy as np", NUMPY)
    setup = "\n".join(row["test_imports"])
    return {"text": row["prompt"], "code": row["code"], "test_setup_code": setup, "test_list": [test]}


def messages(row: DataRow) -> tuple[Message, ...]:
    """The prompt: that of MBPP, with the tests of `test_list`."""
    return mbpp.messages({"text": row["prompt"], "test_list": row["test_list"]})


def reward(completion: str, row: dict[str, Any]) -> float:
    """+1 if the completion's code passes the row's `test` in the sandbox, else -1.

    Raises:
        ResourceError: the sandbox cannot isolate code on this machine.
    """
    return mbpp.reward(completion, _as_mbpp(row))
