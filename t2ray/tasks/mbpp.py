"""MBPP, short Python problems with tests (Austin et al. 2021; hub: google-research-datasets/mbpp, full).

One row: `{"task_id": 2, "text": "Write a function to ...", "code": "def similar_elements ...", "test_setup_code": "",
"test_list": ["assert similar_elements((3, 4), (5, 4)) == (4,)", ...]}`. A row's `task_id` says which split it belongs
to, on the hub and in a local file alike: 11 to 510 are for tests; of those from 601 on, the first 200 rows are for
training and the next 100 for validation, as in the paper's code. Completions run in `sandbox`. No rows are shipped.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from t2ray.core import DataError, Message, user
from t2ray.sandbox import check as sandbox
from t2ray.tasks.files import read
from t2ray.tasks.table import Table
from t2ray.tasks.task import DataRow, Task
from t2ray.tasks.text import settled

HUB = "google-research-datasets/mbpp:full"
COLUMNS = {"task_id": int, "text": str, "code": str, "test_setup_code": str, "test_list": list}

_FENCE = re.compile(r"(?<![`~])(`{3,}|~{3,})(?![`~])[ \t]*\{?\.?([\w+#-]*)[^\n`]*\n")
_QUOTED = re.compile(r"^>(?!>) ?", re.M)
_QUOTES = re.compile(r"\s*(\'{3}|\"{3})(?:python)?\n(.*)\1\s*", re.DOTALL)
_ENDS = re.compile(r"(?:\s*(?:<\|[^<>|\n]{1,40}\|>|</?s>|<(?:end_of_turn|eos)>))+\s*\Z")
_TAGGED = re.compile(r"\[(BEGIN|PYTHON)\](.*?)(?:\[DONE\]|\[/PYTHON\]|\Z)", re.DOTALL)
_PYTHON = {"", "python", "python3", "python2", "py", "py3", "ipython", "ipython3", "code"}
_MARKDOWN = {"markdown", "md"}
_CODE = re.compile(r"(?:def|class|import|from|async def)\s+\w|@\w|[A-Za-z_]\w*\s*=[^=]")
_UNWANTED = {0xFEFF: None, 0x200B: None, 0xA0: " "}  # no Python outside of strings: marks of a file, wide spaces
_MOST_ENDS, _MOST_FENCES = 200, 20


def task(data: str | Sequence[str] | None = None) -> Task:
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
            raise DataError(f"{place}: the code or a test is no Python: {error}") from None
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
    imports, names, classes = interface(row)
    code = extract(completion, names)
    if not code.strip():
        return -1.0
    setup = "\n".join([*imports, row["test_setup_code"]])
    verdict = sandbox.check(code, row["test_list"], names=names, classes=classes, setup=setup)
    return 1.0 if verdict.passed else -1.0


def extract(completion: str, names: Sequence[str]) -> str:
    """Returns the code of a completion that should define `names`.

    It is the fenced block in Python that defines most of them, of several such the last, closed or not; with the
    imports, functions, classes and constants that it uses and other blocks define. `[BEGIN]` and `[PYTHON]` are fences
    too. Without a block it is the whole text, or its part that is Python. Reasoning before the answer does not count.
    """
    text = _ENDS.sub("", settled(completion).translate(_UNWANTED))
    if re.search(r"^> ?(?:```|~~~)", text, re.M):
        text = _QUOTED.sub("", text)
    text = re.sub(r"\r\n?", "\n", text)
    fenced = _fenced(text)
    blocks = [body for kind, body in fenced if kind in _PYTHON] or [body for _, body in fenced]
    blocks = blocks or [body for _, body in _TAGGED.findall(text)]
    if not blocks:
        quoted = _QUOTES.fullmatch(text)
        return quoted[2] if quoted else _python_in(textwrap.dedent(text.partition("[DONE]")[0]))
    trees = [(block, tree) for block in blocks if (tree := _tree(block))]
    if not trees:
        return blocks[-1]
    bound = [{name for statement in tree.body for name in _bound(statement)} for _, tree in trees]
    best = max(range(len(trees)), key=lambda i: (len(bound[i] & {*names}), i))
    missing = ({*names} | _used(trees[best][1])) - bound[best]
    parts = [(best, trees[best][0])]
    others = [(i, statement) for i, (_, tree) in enumerate(trees) if i != best for statement in tree.body]
    for i, statement in reversed(others):
        if missing & {*_bound(statement)}:
            missing = (missing - {*_bound(statement)}) | (_used(statement) - bound[best])
            first = min([statement.lineno, *(line.lineno for line in getattr(statement, "decorator_list", []))])
            parts.insert(0, (i, "\n".join(trees[i][0].split("\n")[first - 1 : statement.end_lineno])))
    return "\n".join(part for _, part in sorted(parts, key=lambda part: part[0]))  # as the text has them


def _fenced(text: str) -> list[tuple[str, str]]:
    """Returns the fenced blocks of a text, each as its language and what it holds.

    Of a block in Python a fence within one of its strings is no end.
    """
    found: list[tuple[str, str]] = []
    at = 0
    while opening := _FENCE.search(text, at):
        fences = itertools.islice(re.finditer(re.escape(opening[1]), text[opening.end() :]), _MOST_FENCES)
        ends = [opening.end() + fence.start() for fence in fences] or [len(text)]
        kind = opening[2].lower()
        bodies = [textwrap.dedent(text[opening.end() : end]) for end in ends]
        whole = (i for i, body in enumerate(bodies) if kind in _PYTHON and _tree(body))
        chosen = next(whole, 0)
        found += _fenced(bodies[chosen]) if kind in _MARKDOWN else [(kind, bodies[chosen])]
        at = min(len(text), ends[chosen] + len(opening[1]))
    return found


def _tree(code: str) -> ast.Module | None:
    try:
        return _parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a completion may be no Python
        return None


def _bound(statement: ast.AST) -> list[str]:
    """The names that an import, a function, a class or an assignment gives a module; `area = area(2)` gives none."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    names = []
    for child in ast.iter_child_nodes(statement):  # of an assignment, or of what `if` and `try` hold
        if isinstance(child, ast.expr):
            stored = (
                part for part in ast.walk(child) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            )
            names += [part.id for part in stored]
        else:
            names += _bound(child)
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
        read = {part.id for part in ast.walk(statement.value) if isinstance(part, ast.Name)}
        names = [name for name in names if name not in read]
    return names


def _used(tree: ast.AST) -> set[str]:
    """The names that code reads and does not set itself."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    own = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return (
        {node.id for node in nodes if isinstance(node.ctx, ast.Load)}
        - own
        - {node.id for node in nodes if not isinstance(node.ctx, ast.Load)}
    )


def _python_in(text: str) -> str:
    """The whole text if it is Python, or else its first line of code and as many lines after it as are Python."""
    if _tree(text):
        return text
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if _CODE.match(line)), None)
    if start is None:
        return text
    ends = [end for end in range(start + 1, len(lines) + 1) if end == len(lines) or not lines[end][:1].isspace()]
    for end in reversed(ends[-_MOST_ENDS:]):
        if _tree(part := "\n".join(lines[start:end])):
            return part
    return text


def interface(row: DataRow) -> tuple[list[str], list[str], list[str]]:
    """Returns what the tests use of the reference solution: its import statements, the names it defines, its classes.

    The tests run with these imports, so that no candidate can give them another `math`. Only these names are taken from
    a candidate.
    """
    tests = _parse(row["test_setup_code"], *row["test_list"])
    used = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    imports, names, classes = [], set(), set()
    for node in _parse(row["code"]).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if used & {(alias.asname or alias.name).partition(".")[0] for alias in node.names}:
                imports.append(ast.unparse(node))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            classes |= {node.name} if isinstance(node, ast.ClassDef) else set()
        elif isinstance(node, ast.Assign):
            names |= {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return imports, sorted(used & names), sorted(used & classes)
