"""HumanEval and HumanEval+, Python functions to complete (Chen et al. 2021; Liu et al. 2023). No rows are shipped.

Hub: openai/openai_humaneval, and evalplus/humanevalplus, which has many more tests. One row: `{"task_id":
"HumanEval/0", "prompt": "def has_close(...):\\n    \\"\\"\\" Check ...", "canonical_solution": "    for ...", "test":
"def check(candidate): ...", "entry_point": "has_close"}`. The set has tests alone: of every eight rows, the 1st is for
training (and for shots), the 2nd for validation, the others for tests; the split "all" has all 164. Completions run in
`sandbox`.
"""

from __future__ import annotations

import ast
import functools
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from t2ray.core import DataError, Message, user
from t2ray.sandbox import check as sandbox
from t2ray.tasks import mbpp
from t2ray.tasks.files import read
from t2ray.tasks.table import Table
from t2ray.tasks.task import DataRow, Task
from t2ray.tasks.text import settled

HUB = "openai/openai_humaneval"
PLUS = "evalplus/humanevalplus"
COLUMNS = {"task_id": str, "prompt": str, "canonical_solution": str, "test": str, "entry_point": str}

NUMPY = """
class np:
    float32 = float64 = float
    class ndarray: pass
    @staticmethod
    def allclose(out, exp, rtol=1e-5, atol=1e-8):
        if isinstance(exp, (list, tuple)):
            same = isinstance(out, (list, tuple)) and len(out) == len(exp)
            return same and all(np.allclose(o, e, rtol, atol) for o, e in zip(out, exp))
        return out == exp or abs(out - exp) <= atol + rtol * abs(exp)
    class testing:
        @staticmethod
        def assert_allclose(out, exp, rtol=1e-7, atol=0):
            assert np.allclose(out, exp, rtol, atol)
"""
"""What EvalPlus' tests use of numpy, which the sandbox does not have."""


def task(data: str | Sequence[str] | None = None) -> Task:
    """The task HumanEval, from the hub or from a local file with the same columns.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """
    return _task("humaneval", HUB, data)


def plus(data: str | Sequence[str] | None = None) -> Task:
    """The task HumanEval+, from the hub or from a local file with the same columns.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """
    return _task("humaneval_plus", PLUS, data)


def _task(name: str, hub: str, data: str | Sequence[str] | None) -> Task:
    @functools.cache
    def splits() -> Mapping[str, list[DataRow]]:
        rows: list[DataRow] = [*_checked(read(data) if data is not None else read(hub, "test"))]
        test = [row for i, row in enumerate(rows) if i % 8 > 1]
        return {"train": rows[::8], "validation": rows[1::8], "test": test, "all": rows}

    if data is not None:
        splits()
    return Task(
        name=name,
        rows=lambda split: splits()[split],
        messages=messages,
        reward="t2ray.tasks.humaneval:reward",
        gold=lambda row: f"```python\n{row['prompt']}{row['canonical_solution']}\n```",
        max_tokens=512,
    )


def _checked(table: Table) -> list[dict[str, Any]]:
    for place, row in zip(table.places, table.need(COLUMNS).rows, strict=True):
        try:
            names = [statement.name for statement in _functions(row["prompt"] + row["canonical_solution"])]
            ast.parse(row["test"])
        except (SyntaxError, ValueError) as error:
            raise DataError(f"{place}: the prompt with its solution or the test is no Python: {error}") from None
        if row["entry_point"] not in names:
            raise DataError(f"{place}: the prompt defines no function {row['entry_point']!r}, its entry_point")
    return table.rows


def _functions(code: str) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]


def messages(row: DataRow) -> tuple[Message, ...]:
    """The prompt: the beginning of the function, and the form that the answer must have."""
    return user(
        f"Complete this function:\n\n```python\n{row['prompt']}```\n\n"
        "Answer with one ```python block that has the whole function, and nothing else."
    )


def reward(completion: str, row: dict[str, Any]) -> float:
    """+1 if the completion's function passes the row's test in the sandbox, else -1.

    The test calls what the prompt defines beside the function (row 38's `encode_cyclic`) in the prompt's own form.

    Raises:
        ResourceError: the sandbox cannot isolate code on this machine.
    """
    given, name = _given(row), row["entry_point"]
    code = program(completion, row)
    if code is None:
        return -1.0
    setup = f"{given}\n{row['test'].replace('import numpy as np', NUMPY)}"
    verdict = sandbox.check(f"{given}\n{code}", [f"check({name})"], names=[name], setup=setup)
    return 1.0 if verdict.passed else -1.0


def _given(row: DataRow) -> str:
    """Returns what the prompt has beside the function: imports and other functions."""
    prompt = row["prompt"] + row["canonical_solution"]
    others = [node for node in ast.parse(prompt).body if getattr(node, "name", None) != row["entry_point"]]
    return "\n".join(map(ast.unparse, others))


def program(completion: str, row: DataRow) -> str | None:
    """Returns the function that a completion writes, or the prompt with the body that it goes on with; or None."""
    code = mbpp.extract(completion, [row["entry_point"]])
    try:
        if row["entry_point"] in [function.name for function in _functions(code)]:
            return code
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # it may be a body alone, or no Python
        pass
    for body in (_body(settled(completion)), textwrap.indent(textwrap.dedent(code), "    ")):
        try:
            ast.parse(row["prompt"] + body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if body.strip():
            return str(row["prompt"]) + body
    return None


def _body(text: str) -> str:
    """Returns the indented lines with which a text begins."""
    match = re.match(r"(?:[ \t]+[^\n]*(?:\n|\Z)|[ \t]*\n)*", text)
    return match[0] if match else ""
