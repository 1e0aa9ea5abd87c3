"""Rows from a JSONL, CSV or Parquet file or from the hub, and tasks made of a user's own rows, prompt and reward.

`datasets` and `pyarrow` are imported only if a source needs them; no remote code is run. A file is checked when its
task is made, so that a mistake is reported, with its line, before anything is trained.
"""

from __future__ import annotations

import csv
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ray.core import ConfigError, DataError, Message, user
from t2ray.tasks.task import LONGEST, DataRow, Task, load_reward

if TYPE_CHECKING:
    from t2ray.config.train import DomainConfig

FORMATS = (".jsonl", ".csv", ".parquet")
_HUB_ID = re.compile(r"[\w-]+(/[\w.-]+)?(:[\w.-]+)?")
_HOLD_OUT = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows with their places: `Table(source="dog.jsonl", rows=[{"text": "Once"}], places=["line 1"])`."""

    source: str
    rows: list[dict[str, Any]]
    places: list[str]

    @property
    def columns(self) -> list[str]:
        return sorted({column for row in self.rows for column in row})

    def need(self, columns: Mapping[str, type]) -> Table:
        """Returns the table itself if every row has these columns with values of these types.

        Raises:
            DataError: a row does not; the message names the file, the line, the column and its value.
        """
        for place, row in zip(self.places, self.rows, strict=True):
            for column, kind in columns.items():
                value = row.get(column)
                if value is None:
                    raise DataError(
                        f"{self.source}, {place}: the column {column!r} is missing; the row has "
                        f"{', '.join(row) or 'none'}"
                    )
                if not isinstance(value, kind):
                    raise DataError(
                        f"{self.source}, {place}: the column {column!r} holds {str(value)[:60]!r} "
                        f"({type(value).__name__}); it must hold {kind.__name__}"
                    )
        return self


# -------------------------------------------------------------------------------------------------------------- reading


def read(source: str, split: str = "train", folder: str | None = None) -> Table:
    """Reads a local file, or one split of a hub data set (`id` or `id:configuration`).

    A relative path is looked up in the working folder, then in `folder`.

    Raises:
        DataError: the file is missing, empty, malformed (the message has the line) or of another format, or one of its
            columns has values of several types; or the hub cannot be reached or has no such data set.
    """
    places = [Path(source), *([Path(folder) / source] if folder else [])]
    path = next((place for place in places if place.is_file()), None)
    if path is None and (Path(source).suffix in FORMATS or not _HUB_ID.fullmatch(source)):
        raise DataError(f"{source}: no such data file; give a {', '.join(FORMATS)} file or a hub data set's id")
    if path is None:
        return _hub(source, split)
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: its name ends in {path.suffix!r}; a data file is one of {', '.join(FORMATS)}")
    numbered = list(readers[path.suffix](path))
    if not numbered:
        raise DataError(f"{path}: the file holds no rows")
    table = Table(source=str(path), places=[place for place, _ in numbered], rows=[row for _, row in numbered])
    _check_types(table)
    return table


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: a row is an object of columns, not {type(row).__name__}")
            yield f"line {number}", row


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header) or not all(header):
                raise DataError(f"{path}, line 1: the header {header} must name every column, each once")
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(fields)} fields, but the header names {len(header)}"
                    )
                if fields:
                    yield f"line {reader.line_num}", dict(zip(header, fields, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num + 1}: not valid CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from None
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _hub(source: str, split: str) -> Table:
    import datasets
    from huggingface_hub.utils import logging

    # Each of the hub's retries would print two lines before the error that counts.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    name, _, configuration = source.partition(":")
    try:
        rows = list(datasets.load_dataset(name, configuration or None, split=split))
    except (OSError, ValueError, RuntimeError) as error:  # offline, unknown, gated, no such configuration or split
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot load the data set {source!r}, split {split!r}, from the hub: {reason}; "
            f"give a local {', '.join(FORMATS)} file with data instead"
        ) from None
    if not rows:
        raise DataError(f"the data set {source!r} has no rows in its split {split!r}")
    return Table(source=f"{source} ({split})", rows=rows, places=[f"row {i}" for i in range(1, len(rows) + 1)])


def _check_types(table: Table) -> None:
    """Raises DataError if a column has values of several types, such as a number after texts."""
    kinds: dict[str, tuple[str, str]] = {}
    for place, row in zip(table.places, table.rows, strict=True):
        for column, value in row.items():
            if value is None:
                continue
            kind = "number" if type(value) in (int, float) else type(value).__name__
            first, since = kinds.setdefault(column, (kind, place))
            if kind != first:
                raise DataError(
                    f"{table.source}, {place}: the column {column!r} holds a {kind}, but a {first} in {since}; "
                    "make them alike"
                )


# ------------------------------------------------------------------------------------------------------------- own data


def own(name: str, domain: DomainConfig, folder: str) -> Task:
    """Makes a task of the user's own rows, prompt and reward.

    Every 10th row of `data` is held out for validation, unless `validation` names other rows. With fewer than 10 rows,
    all of them are both for training and for validation. The "test" split has the validation rows.

    Args:
        folder: the folder of the YAML file, in which the data and the reward's module are looked up.

    Raises:
        ConfigError: the prompt or `gold` names a column that the data does not have, or the reward cannot be imported.
        DataError: the data cannot be read, or a row lacks a column that the prompt or `gold` needs.
    """
    rewards = domain.rewards
    assert domain.data and domain.prompt and rewards, domain
    for reward in [rewards] if isinstance(rewards, str) else rewards:
        load_reward(reward, folder)
    table = read(domain.data, domain.split, folder)
    messages = _prompt(domain.prompt, table)
    gold = domain.gold
    if gold is not None and gold not in table.columns:
        raise ConfigError(f"gold: {table.source} has no column {gold!r}; it has {', '.join(table.columns)}")
    needed = {} if gold is None else {gold: object}
    table.need(needed)
    train, validation = table.rows, table.rows
    placed = [f"{table.source}, {place}" for place in table.places]
    places = {"train": placed, "validation": placed, "all": placed}
    if domain.validation is not None:
        is_file = Path(domain.validation).suffix in FORMATS
        held = read(domain.validation, folder=folder) if is_file else read(domain.data, domain.validation, folder)
        if not is_file and held.source == table.source:
            raise ConfigError(
                f"validation {domain.validation!r} is no {', '.join(FORMATS)} file, and {table.source} has no splits"
            )
        _prompt(domain.prompt, held.need(needed))
        validation = held.rows
        places["validation"] = [f"{held.source}, {place}" for place in held.places]
    elif len(table.rows) >= _HOLD_OUT:
        validation = table.rows[_HOLD_OUT - 1 :: _HOLD_OUT]
        train = [row for i, row in enumerate(table.rows) if i % _HOLD_OUT != _HOLD_OUT - 1]
        places |= {
            "train": [place for i, place in enumerate(placed) if i % _HOLD_OUT != _HOLD_OUT - 1],
            "validation": placed[_HOLD_OUT - 1 :: _HOLD_OUT],
        }
    rows = {"train": train, "validation": validation, "test": validation, "all": table.rows}
    return Task(
        name=name,
        rows=rows.__getitem__,
        messages=messages,
        reward=rewards,
        gold=None if gold is None else lambda row: str(row[gold]),
        max_tokens=domain.max_tokens or LONGEST,
        to_end=domain.max_tokens is None,
        places=places.__getitem__,
    )


def _prompt(prompt: str, table: Table) -> Callable[[DataRow], tuple[Message, ...]]:
    """Returns the function from a row to its conversation, after checking that every row of the table fits it."""
    if "{" not in prompt and "}" not in prompt:
        return _messages_column(prompt, table)
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None]
    except ValueError as error:
        raise ConfigError(f"prompt {prompt!r}: {error}; write {{column}} for a column, {{{{ }}}} for braces") from None
    for field in fields:
        if field not in table.columns:
            raise ConfigError(
                f"prompt {prompt!r}: {table.source} has no column {field!r}; it has {', '.join(table.columns)}"
            )
    table.need(dict.fromkeys(fields, object))
    return lambda row: user(prompt.format_map(row))


def _messages_column(column: str, table: Table) -> Callable[[DataRow], tuple[Message, ...]]:
    if column not in table.columns:
        raise ConfigError(
            f"prompt {column!r} is neither a template with a {{column}} nor a column of {table.source}; "
            f"it has {', '.join(table.columns)}"
        )
    for place, row in zip(table.places, table.rows, strict=True):
        turns = row.get(column)
        if not (isinstance(turns, Sequence) and turns and all(map(_is_turn, turns))):
            raise DataError(
                f"{table.source}, {place}: the column {column!r} must hold messages, a list of "
                '{"role": "system", "user" or "assistant", "content": text}; for a text column write prompt: '
                f'"{{{column}}}"'
            )
    return lambda row: tuple(Message(role=turn["role"], content=turn["content"]) for turn in row[column])


def _is_turn(turn: object) -> bool:
    return (
        isinstance(turn, Mapping)
        and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str)
    )
