"""The tiny model's code domain: an instruction in words, answered by the body of a Python function, which is run.

`add 3 to n` wants `return n+3`. Its sibling, on which no expert is trained, has two steps: `add 3 to n then times 2`
wants `return (n+3)*2`. A completion is run only if its text and its syntax tree belong to a grammar so small that
evaluating it is a handful of integer operations; it needs no sandbox. Not here: the splits (`tiny.py`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

VARIABLES = "nkmpqrtuvwyz"  # without the letters of number literals: 0x1, 0b1, 0o1, 1e3, 1j

FIRST = {
    "+": ("add {c} to {v}", "increase {v} by {c}", "{v} plus {c}"),
    "-": ("subtract {c} from {v}", "decrease {v} by {c}", "{v} minus {c}"),
    "*": ("multiply {v} by {c}", "scale {v} by {c}", "{v} times {c}"),
    "//": ("divide {v} by {c}", "split {v} by {c}", "{v} over {c}"),
    "%": ("reduce {v} mod {c}", "remainder of {v} by {c}", "{v} mod {c}"),
}
THEN = {"+": "plus", "-": "minus", "*": "times", "//": "over", "%": "mod"}

HIDDEN_INPUTS = (-41, -7, -1, 0, 1, 2, 3, 5, 8, 13, 19, 64, 101, 997, 12345)

_MAX_LENGTH = 48
_MAX_OPERATORS = 4
_BODY = re.compile(r"return (?:[a-z]|[0-9]{1,3}(?![0-9])|//|[-+*%() ])+")
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)


def apply(operator: str, left: int, right: int) -> int:
    """Returns what an instruction computes, without evaluating any text."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    return left // right if operator == "//" else left % right


def short_programs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (group, row) of instructions with one step; all phrasings of a program are one group."""
    for v, (op, phrases), c in product(VARIABLES, FIRST.items(), range(2, 21)):
        tests = [[x, apply(op, x, c)] for x in HIDDEN_INPUTS]
        for phrase in phrases:
            answer = f"return {v}{op}{c}"
            yield f"{v} {tests}", {"prompt": phrase.format(v=v, c=c), "answer": answer, "variable": v, "tests": tests}


def long_programs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (group, row) of instructions with two steps; programs that compute the same (`(n+3)+4`, `(n+4)+3`) are one
    group.
    """
    steps = product(FIRST.items(), range(2, 10), THEN.items(), range(2, 10))
    for v, ((op, phrases), c, (then, word), d) in product(VARIABLES, steps):
        tests = [[x, apply(then, apply(op, x, c), d)] for x in HIDDEN_INPUTS]
        prompt = f"{phrases[(c + d) % len(phrases)].format(v=v, c=c)} then {word} {d}"
        answer = f"return ({v}{op}{c}){then}{d}"
        yield f"{v} {tests}", {"prompt": prompt, "answer": answer, "variable": v, "tests": tests}


def parse_body(text: str, variable: str) -> ast.expr | None:
    """Returns the expression of `return <expression>`, or None if the text does not belong to the grammar.

    The grammar: `+ - * // %` over the one variable and integers of at most three digits, at most four operators, in at
    most 48 characters. The characters are checked before Python's parser sees them, so that no text can make it warn.
    """
    if len(text) > _MAX_LENGTH or not _BODY.fullmatch(text):
        return None
    if any(name not in ("return", variable) for name in re.findall(r"[a-z]+", text)) or re.search(r"[0-9][a-z]", text):
        return None
    try:
        body = ast.parse(text).body
    except SyntaxError:  # unbalanced brackets, two operands in a row: a wrong answer
        return None
    if len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
        return None
    expression = body[0].value
    return expression if _operators(expression, variable) <= _MAX_OPERATORS else None


def _operators(node: ast.expr, variable: str) -> int:
    """The number of operators in an expression of the grammar; too many for any other expression."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, _OPERATORS):
        return 1 + _operators(node.left, variable) + _operators(node.right, variable)
    if isinstance(node, ast.Name) and node.id == variable:
        return 0
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return 0
    return _MAX_OPERATORS + 1


def reward_code(completion: str, row: Mapping[str, Any]) -> float:
    """+1 if the completion is one return statement that computes the right value for every hidden input, else -1."""
    variable = row["variable"]
    expression = parse_body(completion.strip(), variable)
    if expression is None:
        return -1.0
    function = compile(ast.Expression(expression), "<completion>", "eval")
    try:
        right = all(eval(function, {"__builtins__": {}}, {variable: x}) == y for x, y in row["tests"])
    except ZeroDivisionError:  # the only error that an expression of the grammar can raise
        return -1.0
    return 1.0 if right else -1.0
