"""The tasks that t2ray knows by name (`builtin`), and the two ways to make one: from `own` data, or by `dispatch` from
other tasks.
"""

from __future__ import annotations

import difflib

from t2ray.core import ConfigError, user
from t2ray.tasks import tiny
from t2ray.tasks.arc import challenge, easy
from t2ray.tasks.data import own
from t2ray.tasks.dispatch import dispatch
from t2ray.tasks.gsm8k import task as gsm8k_task
from t2ray.tasks.mbpp import task as mbpp_task
from t2ray.tasks.task import Task

__all__ = ["BUILTIN", "Task", "builtin", "dispatch", "own"]

_REAL = {"gsm8k": gsm8k_task, "arc_easy": easy, "arc_challenge": challenge, "mbpp": mbpp_task}

BUILTIN = (*tiny.TASKS, *_REAL)


def builtin(name: str, data: str | None = None) -> Task:
    """Returns a built-in task.

    Args:
        data: a local file with the rows of a real data set, instead of the hub.

    Raises:
        ConfigError: there is no task of that name, or `data` is given for a task of the tiny model, which generates
            its rows.
        DataError: the file cannot be read, or one of its rows does not have what the task needs.
    """
    if name in _REAL:
        return _REAL[name](data)
    if name not in tiny.TASKS:
        close = difflib.get_close_matches(name, BUILTIN, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"unknown task {name!r}; {hint}there are {', '.join(BUILTIN)}")
    if data is not None:
        raise ConfigError(f"task {name!r} makes its own rows and takes no data file; leave out {data!r}")
    return Task(
        name=name,
        rows=lambda split: [row for part in tiny.SPLITS if split in (part, "all") for row in tiny.rows(name, part)],
        messages=lambda row: user(row["prompt"]),
        reward=f"t2ray.tasks.tiny:reward_{tiny.PARENT.get(name, name)}",
        gold=tiny.gold,
        max_tokens=24,
    )
