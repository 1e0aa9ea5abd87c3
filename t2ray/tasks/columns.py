"""What a row's columns hold: texts, parts of nested values, conversations; and the prompts that are made of them.

A path names a column, or a part of what one holds: `answer`, `reward_model.ground_truth`, `choices.text.0`. A column
whose own name has dots is found by that name.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from t2ray.core import ConfigError, DataError, Message, user
from t2ray.tasks.table import Table
from t2ray.tasks.task import DataRow

_ABSENT = object()

Conversation = tuple[tuple[Message, ...], str | None]
"""The turns up to where the answer begins, and the answer where the column has one."""


class Unfit(ValueError):
    """What is wrong with a row, without its place."""


def check(table: Table, *paths: str) -> None:
    """Raises unless every row has a text, or what can be written as one, at each path, all of one kind.

    Raises:
        ConfigError: no row has a path.
        DataError: a row does not, with its place.
    """
    for path in paths:
        _check_known(table, path)
        first: tuple[str, str] | None = None
        for place, row in zip(table.places, table.rows, strict=True):
            try:
                value = part(row, path)
                text_of(value, path)
            except Unfit as error:
                raise DataError(f"{place}: {error}") from None
            except KeyError:
                raise DataError(f"{place}: {table.absent(row, path)}") from None
            kind = "number" if type(value) in (int, float) else type(value).__name__
            first = first or (kind, place)
            if kind != first[0]:
                raise DataError(
                    f"{place}: the column {path!r} holds a {kind}, but a {first[0]} in {first[1]}; make them alike"
                )


def _check_known(table: Table, path: str) -> None:
    if all(_part(row, path) is _ABSENT for row in table.rows) and path not in table.unusable:
        raise ConfigError(f"{table.source} has no column {path!r}; it has {', '.join(table.columns) or 'none'}")


def part(row: DataRow, path: str) -> Any:
    """Returns what a row has at a path.

    Raises:
        KeyError: it has nothing there.
    """
    if (value := _part(row, path)) is _ABSENT:
        raise KeyError(path)
    return value


def _part(value: Any, path: str) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = {str(i): item for i, item in enumerate(value)}
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return _ABSENT
    if path in value:
        return value[path]
    path = re.sub(r"\[(\w+)\]", r".\1", path)
    for dot in re.finditer(r"\.", path):
        head, rest = path[: dot.start()], path[dot.end() :]
        if head in value and (found := _part(value[head], rest)) is not _ABSENT:
            return found
    return _ABSENT


def text_of(value: Any, path: str) -> str:
    """Returns a value as a prompt or an answer shows it.

    Raises:
        Unfit: it is null or not a number, or a list, a mapping or bytes, which are no text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise Unfit(f"the column {path!r} is {'null' if value is None else 'NaN'}")
    if isinstance(value, bytes):
        raise Unfit(f"the column {path!r} holds bytes that are no UTF-8 text")
    if isinstance(value, Mapping | list | tuple):
        inner = f"{path}.{next(iter(value), 'name') if isinstance(value, Mapping) else 0}"
        kind = "a mapping" if isinstance(value, Mapping) else "a list"
        raise Unfit(f"the column {path!r} holds {kind}, which is no text; name a part of it, such as {inner}")
    text = str(value)
    if re.search("[\ud800-\udfff]", text):
        raise Unfit(f"the column {path!r} holds half of a character (a lone surrogate), which is no text")
    return text


# -------------------------------------------------------------------------------------------------------------- prompts


def template(prompt: str, table: Table) -> Callable[[DataRow], tuple[Message, ...]]:
    """Returns the function from a row to the prompt that a template such as "Q: {question}" makes of it.

    Raises:
        ConfigError: the template is malformed, or names a column that the table does not have.
        DataError: a row does not fit it.
    """
    try:
        pieces = [*string.Formatter().parse(prompt)]
    except ValueError as error:
        raise ConfigError(f"prompt {prompt!r}: {error}; write {{column}} for a column, {{{{ }}}} for braces") from None
    fields = []
    for literal, path, code, conversion in pieces:
        if conversion or "{" in (code or ""):
            raise ConfigError(f"prompt {prompt!r}: write {{{path}}}, or a format such as {{{path}:.2f}}")
        whole = f"{path}:{code}"
        known = code and any(whole in row for row in table.rows[:1])  # a column whose name has a colon
        fields.append((literal, whole if known else path, "" if known else code))
    paths = [path for _, path, _ in fields if path is not None]
    try:
        check(table, *paths)
    except ConfigError as error:
        raise ConfigError(f"prompt {prompt!r}: {error}") from None

    def fill(row: DataRow) -> tuple[Message, ...]:
        values = {path: part(row, path) for path in paths}
        texts = {path: text_of(value, path) for path, value in values.items()}
        if texts and not any(text.strip() for text in texts.values()):
            raise Unfit(f"the prompt is empty, because the column {paths[0]!r} is")
        return user("".join(literal + _formatted(path, code, values, texts) for literal, path, code in fields))

    _try_all(fill, table)
    return fill


def _formatted(path: str | None, code: str | None, values: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    if path is None:
        return ""
    try:
        return format(values[path], code) if code else texts[path]
    except (ValueError, TypeError) as error:
        raise Unfit(f"the column {path!r} holds {texts[path][:60]!r}, which {code!r} cannot format: {error}") from None


def conversations(path: str, table: Table) -> Callable[[DataRow], Conversation]:
    """Returns the function from a row to the conversation that a column of messages holds.

    Raises:
        ConfigError: the table has no such column.
        DataError: a row has no messages there.
    """
    try:
        _check_known(table, path)
    except ConfigError:
        raise ConfigError(
            f"prompt {path!r} is neither a template with a {{column}} nor a column of {table.source}; "
            f"it has {', '.join(table.columns)}"
        ) from None

    def turns(row: DataRow) -> Conversation:
        value = part(row, path)
        if isinstance(value, str) and value.lstrip().startswith("["):  # as CSV files have them
            with suppress(ValueError, RecursionError):
                value = json.loads(value)
        read = [*map(_turn, value)] if isinstance(value, list | tuple) else []
        messages = [turn for turn in read if turn]
        if value is None:
            raise Unfit(f"the column {path!r} is null")
        if not messages or len(messages) < len(read):
            raise Unfit(
                f"the column {path!r} must hold messages, a list of "
                '{"role": "system", "user" or "assistant", "content": text}; for a text column write prompt: '
                f'"{{{path}}}"'
            )
        answer = messages.pop().text if messages[-1].role == "assistant" else None
        if not messages or messages[-1].role == "assistant" or not messages[-1].text.strip():
            raise Unfit(
                f"the column {path!r} must hold a turn of the user that is not empty, and at most one answer to it"
            )
        return tuple(messages), answer

    _try_all(turns, table)
    return turns


def holds_messages(path: str, table: Table) -> bool:
    """Whether a column holds lists of turns, by its first row."""
    value = _part(table.rows[0], path)
    return isinstance(value, list | tuple) and bool(value) and all(map(_turn, value))


def _turn(turn: object) -> Message | None:
    if not isinstance(turn, Mapping) or turn.get("role") not in ("system", "user", "assistant"):
        return None
    content = turn.get("content")
    if isinstance(content, list | tuple):  # OpenAI's other form, of parts
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        content = "".join(map(str, texts)) if len(texts) == len(content) else None
    return Message(role=turn["role"], content=content) if isinstance(content, str) else None


def _try_all(make: Callable[[DataRow], object], table: Table) -> None:
    for place, row in zip(table.places, table.rows, strict=True):
        try:
            make(row)
        except Unfit as error:
            raise DataError(f"{place}: {error}") from None
        except KeyError as error:
            raise DataError(f"{place}: {table.absent(row, error.args[0])}") from None
