"""Tasks made of a user's own rows, prompt and reward.

The rows are checked when their task is made, so that a mistake is reported, with its line, before anything is trained.
Not here: reading rows (`files`), and what a column holds (`columns`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from t2ray.core import ConfigError, DataError, Message
from t2ray.tasks.columns import check, conversations, holds_messages, part, template, text_of
from t2ray.tasks.files import is_file_like, read
from t2ray.tasks.images import images_of, with_images
from t2ray.tasks.table import FORMATS, Table
from t2ray.tasks.task import LONGEST, DataRow, Task, load_reward

if TYPE_CHECKING:
    from t2ray.config.domain import DomainConfig

_HOLD_OUT = 10


def own(name: str, domain: DomainConfig, folder: str) -> Task:
    """Makes a task of the user's own rows, prompt and reward.

    Every 10th row of `data` is held out for validation, unless `validation` names other rows. With fewer than 10 rows,
    all of them are both for training and for validation. The "test" split has the rows that `test` names, or else those
    of validation.

    Messages that end with the assistant's turn lose it: it is the answer, and the gold where `gold` names no column.

    Args:
        folder: the folder of the YAML file, in which the data and the reward's module are looked up.

    Raises:
        ConfigError: the prompt or `gold` names a column that the data does not have, or the reward cannot be imported.
        DataError: the data cannot be read, or a row lacks what the prompt or `gold` needs.
    """
    rewards = domain.rewards
    assert domain.data and domain.prompt and rewards, domain
    for reward in [rewards] if isinstance(rewards, str) else rewards:
        load_reward(reward, folder)
    table = _seen(domain, read(domain.data, domain.split, folder))
    held = _named(domain, "validation", table, folder)
    test = _named(domain, "test", table, folder)
    tables = [named for named in (table, held, test) if named is not None]
    written, answer, notes = _prompt(domain.prompt, tables)
    gold = answer if domain.gold is None else _gold(domain.gold, tables)
    rows, places = _splits(table, held, test)
    return Task(
        name=name,
        rows=rows.__getitem__,
        messages=written if domain.image is None else _pictured(written, domain.image),
        reward=rewards,
        gold=gold,
        max_tokens=domain.max_tokens or LONGEST,
        to_end=domain.max_tokens is None,
        places=places.__getitem__,
        notes=notes,
        test_is_unseen=test is not None,
    )


def _seen(domain: DomainConfig, table: Table) -> Table:
    """Returns the rows with their pictures, if the domain has any."""
    return table if domain.image is None else with_images(table, domain.image)


def _pictured(
    written: Callable[[DataRow], tuple[Message, ...]], column: str
) -> Callable[[DataRow], tuple[Message, ...]]:
    """Returns the function from a row to its conversation, whose last turn begins with the row's pictures."""

    def messages(row: DataRow) -> tuple[Message, ...]:
        *before, last = written(row)
        return (*before, replace(last, content=(*images_of(row[column]), last.text)))

    return messages


def _splits(
    table: Table, held: Table | None, test: Table | None
) -> tuple[dict[str, list[DataRow]], dict[str, list[str]]]:
    """Returns the rows of each split, and their places."""
    parts: list[dict[str, list[Any]]] = []
    for whole, own, last in (
        (table.rows, held and held.rows, test and test.rows),
        (table.places, held and held.places, test and test.places),
    ):
        train, validation = [*whole], own or [*whole]
        if own is None and len(whole) >= _HOLD_OUT:
            validation = train[_HOLD_OUT - 1 :: _HOLD_OUT]
            del train[_HOLD_OUT - 1 :: _HOLD_OUT]
        parts.append({"train": train, "validation": validation, "test": last or validation, "all": [*whole]})
    return parts[0], parts[1]


def _named(domain: DomainConfig, key: str, table: Table, folder: str) -> Table | None:
    """Returns the rows that `validation` or `test` names, None where it names none."""
    assert domain.data is not None
    named = getattr(domain, key)
    if named is None:
        return None
    if is_file_like(named):
        return _seen(domain, read(named, folder=folder))
    held = _seen(domain, read(domain.data, named, folder))
    if held.places[0] == table.places[0]:
        raise ConfigError(f"{key} {named!r} is no {', '.join(FORMATS)} file, and {table.source} has no splits")
    return held


Gold = Callable[[DataRow], str]


def _prompt(
    prompt: str, tables: list[Table]
) -> tuple[Callable[[DataRow], tuple[Message, ...]], Gold | None, tuple[str, ...]]:
    """Returns the functions from a row to its conversation and to the answer that it ends with, and what is to say."""
    alone = re.fullmatch(r"\{([^{}!:]+)\}", prompt)
    path = alone[1] if alone and holds_messages(alone[1], tables[0]) else prompt
    if "{" in path or "}" in path:
        return [template(path, table) for table in tables][0], None, ()
    turns = [conversations(path, table) for table in tables][0]  # the same of each; all are checked
    count = sum(turns(row)[1] is not None for table in tables for row in table.rows)
    total = sum(len(table.rows) for table in tables)
    note = (
        f"{count} of {total} rows end with the assistant's answer in {path!r}; it is cut off from the prompt"
        + (", and it is the right answer unless gold names another" if count == total else "")
    )  # fmt: skip
    return (
        lambda row: turns(row)[0],
        (lambda row: turns(row)[1] or "") if count == total else None,
        (note,) if count else (),
    )


def _gold(path: str, tables: list[Table]) -> Gold:
    """Returns the function from a row to its right answer."""
    for table in tables:
        try:
            check(table, path)
        except ConfigError as error:
            raise ConfigError(f"gold: {error}") from None
        for place, row in zip(table.places, table.rows, strict=True):
            if not text_of(part(row, path), path).strip():
                raise DataError(f"{place}: the column {path!r} is empty; a right answer has text")
    return lambda row: text_of(part(row, path), path)
