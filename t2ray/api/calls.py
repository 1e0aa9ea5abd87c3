"""Calls of functions, as models write them: from a text that holds nothing else to the calls.

| form | a call |
| --- | --- |
| JSON (Hermes, Llama 3) | `{"name": "add", "arguments": {"a": 1}}`, or a list of such |
| Mistral, between its signs | `[{"name": "add", "arguments": {"a": 1}}]`, or `add[ARGS]{"a": 1}` |
| Python (Llama 3.2 and 4) | `[add(a=1), now()]` |
| XML (Qwen3-Coder) | `<function=add><parameter=a>1</parameter></function>` |

A text that is anything else holds no calls. Not here: where in an answer the calls are (`tools.py`).
"""

from __future__ import annotations

import ast
import json
import re
import uuid
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from t2ray.api.formats import FunctionBody

MISTRAL = "[TOOL_CALLS]"
WORDS = {"true": True, "false": False, "null": None}

_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>|\Z)\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)\s*", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function that a model asks to be called: `ToolCall(id="call-1", name="add", arguments='{"a": 1}')`."""

    id: str
    name: str
    arguments: str


def json_calls(text: str) -> list[ToolCall]:
    """The calls that a JSON text writes, one or a list of them."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in items):
        return []
    return [_call(item["name"], item.get("arguments", item.get("parameters", {}))) for item in items]


def mistral_calls(text: str) -> list[ToolCall]:
    """The calls behind Mistral's first sign. Their ids are of nine signs, since its chat templates refuse others."""
    calls: list[ToolCall] = []
    for part in text.split(MISTRAL):
        named = _NAMED.fullmatch(part)
        found = json_calls(f'{{"name": "{named[1]}", "arguments": {named[2]}}}') if named else json_calls(part)
        if not found:
            return []
        calls += found
    return [ToolCall(id=uuid.uuid4().hex[:9], name=call.name, arguments=call.arguments) for call in calls]


def python_calls(text: str) -> list[ToolCall]:
    """The calls of a Python list, whose arguments are named and are values that JSON has."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash in a text
            tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List):
            return []
        calls = []
        for node in tree.elts:
            if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
                return []
            arguments = {word.arg: _value(word.value) for word in node.keywords}
            calls.append(_call(ast.unparse(node.func), arguments))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []
    return calls


def xml_calls(text: str, functions: Sequence[FunctionBody]) -> list[ToolCall]:
    """The calls of tags. A value is of the type that its function's schema says: text, or else JSON."""
    schemas = {function.name: (function.parameters or {}).get("properties", {}) for function in functions}
    calls = []
    for name, inside in _all(_FUNCTION, text):
        parameters = schemas.get(name, {})
        arguments = {key: _typed(value, parameters.get(key)) for key, value in _all(_PARAMETER, inside)}
        if inside.strip() and not arguments:
            return []
        calls.append(_call(name, arguments))
    return calls


def _all(pattern: re.Pattern[str], text: str) -> Iterable[tuple[str, str]]:
    """The pairs that a text is made of; none if there is anything else in it."""
    found, end = [], 0
    while end < len(text) and (match := pattern.match(text, end)):
        found.append((match[1].strip(), match[2]))
        end = match.end()
    return found if end == len(text) else ()


def _typed(text: str, schema: Any) -> Any:
    text = text.removeprefix("\n").removesuffix("\n")
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)


def _value(node: ast.expr) -> Any:
    """A literal of Python's, in which `true`, `false` and `null` may stand for their values."""
    if isinstance(node, ast.Name) and node.id in WORDS:
        return WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key or node): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    return ast.literal_eval(node)


def _call(name: str, arguments: Any) -> ToolCall:
    """A call with an id of its own; raises ValueError or TypeError where the arguments are nothing that JSON has."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", name=name, arguments=text)
