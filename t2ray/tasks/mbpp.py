"""MBPP, short Python problems with tests (Austin et al. 2021; hub: google-research-datasets/mbpp, full).

One row: `{"task_id": 2, "text": "Write a function to ...", "code": "def similar_elements ...", "test_setup_code": "",
"test_list": ["assert similar_elements((3, 4), (5, 4)) == (4,)", ...]}`. A row's `task_id` says which split it belongs
to, on the hub and in a local file alike: 11 to 510 are for tests; of those from 601 on, the first 200 rows are for
training and the next 100 for validation, as in the paper's code. Completions run in `sandbox`. No rows are shipped.
"""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Mapping
from typing import Any

from t2ray.core import DataError, Message, user
from t2ray.sandbox import check as sandbox
from t2ray.tasks.data import Table, read
from t2ray.tasks.task import DataRow, Task

HUB = "google-research-datasets/mbpp:full"
COLUMNS = {"task_id": int, "text": str, "code": str, "test_setup_code": str, "test_list": list}

_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def task(data: str | None = None) -> Task:
    """The task MBPP, from the hub or from a local file with the same columns.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """

    @functools.cache
    def splits() -> Mapping[str, list[DataRow]]:
        tables = [read(data)] if data else [read(HUB, part) for part in ("train", "test", "validation", "prompt")]
        rows: list[DataRow] = [row for table in tables for row in _checked(table)]
        rows.sort(key=lambda row: int(row["task_id"]))
        learn = [row for row in rows if row["task_id"] > 600]
        test = [row for row in rows if 10 < row["task_id"] <= 510]
        return {"train": learn[:200], "validation": learn[200:300], "test": test, "all": rows}

    if data is not None:
        splits()
    return Task(
        name="mbpp",
        rows=lambda split: splits()[split],
        messages=messages,
        reward="t2ray.tasks.mbpp:reward",
        gold=lambda row: str(row["code"]),
        max_tokens=512,
    )


def _checked(table: Table) -> list[dict[str, Any]]:
    for place, row in zip(table.places, table.need(COLUMNS).rows, strict=True):
        try:
            _parse(row["code"], row["test_setup_code"], *row["test_list"])
        except (SyntaxError, TypeError) as error:
            raise DataError(f"{table.source}, {place}: the code or a test is no Python: {error}") from None
    return table.rows


def _parse(*parts: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some rows' code has escapes such as "\\w", about which Python warns
        return ast.parse("\n".join(parts))


def messages(row: DataRow) -> tuple[Message, ...]:
    """The prompt: the problem, its tests (they name the function), and the form that the answer must have."""
    tests = "\n".join(row["test_list"])
    return user(
        f"{row['text']}\nYour code must pass these tests:\n\n{tests}\n\n"
        "Answer with one ```python block and nothing else."
    )


def reward(completion: str, row: dict[str, Any]) -> float:
    """+1 if the completion's code passes all tests of the row in the sandbox, else -1.

    `test_setup_code` runs after the code and may use what the code defines (rows 367 and 927 build a tree of its
    nodes).

    Raises:
        ResourceError: the sandbox cannot isolate code on this machine.
    """
    code = extract(completion)
    if not code.strip():
        return -1.0
    imports, names = interface(row)
    setup = "\n".join([*imports, row["test_setup_code"]])
    return 1.0 if sandbox.check(code, row["test_list"], names=names, setup=setup).passed else -1.0


def extract(completion: str) -> str:
    """Returns the first fenced code block, closed or not, or the whole text if there is none."""
    block = _BLOCK.search(completion)
    return block[1] if block else completion


def interface(row: DataRow) -> tuple[list[str], list[str]]:
    """Returns what the tests use of the reference solution: its import statements, and the names it defines.

    The tests run with these imports, so that no candidate can give them another `math`. Only these names are taken from
    a candidate.
    """
    tests = _parse(row["test_setup_code"], *row["test_list"])
    used = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    imports, names = [], set()
    for node in _parse(row["code"]).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if used & {(alias.asname or alias.name).partition(".")[0] for alias in node.names}:
                imports.append(ast.unparse(node))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return imports, sorted(used & names)
