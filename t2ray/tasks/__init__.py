"""The tasks that t2ray knows by name. `data.own` makes one of a user's own rows, prompt and reward."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence

from t2ray.core import ConfigError
from t2ray.tasks.task import Task

__all__ = ["BUILTIN", "Task", "builtin"]

_TINY = ("math", "math_long", "code", "code_long", "pick", "pick_more", "others")
_VISION = ("shapes", "counts", "places")
_REAL = {
    "gsm8k": "gsm8k:task", "arc_easy": "arc:easy", "arc_challenge": "arc:challenge", "mbpp": "mbpp:task",
    "mbpp_plus": "mbpp_plus:task", "humaneval": "humaneval:task", "humaneval_plus": "humaneval:plus",
    "competition_math": "competition_math:task", "ifeval": "ifeval:task",
    "brief": "forms:brief", "brief_20": "forms:brief_20", "json": "forms:as_json", "brief_json": "forms:brief_json",
    "easy_vqa": "vqa:easy", "textvqa": "vqa:textvqa", "okvqa": "vqa:okvqa",
}  # fmt: skip
BUILTIN = (*_TINY, *_VISION, *_REAL)
"""The names of the built-in tasks. The module of a task is imported when it is asked for."""


def builtin(name: str, data: str | Sequence[str] | None = None) -> Task:
    """Returns a built-in task.

    Args:
        data: a source of the rows of a real data set (`files.read`), instead of the hub.

    Raises:
        ConfigError: there is no task of that name, or `data` is given for a task of a tiny model, which generates
            its rows.
        DataError: the file cannot be read, or one of its rows does not have what the task needs.
    """
    if name in _REAL:
        module, _, function = _REAL[name].partition(":")
        task: Task = getattr(importlib.import_module(f"t2ray.tasks.{module}"), function)(data)
        return task
    if name not in (*_TINY, *_VISION):
        close = difflib.get_close_matches(name, BUILTIN, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"unknown task {name!r}; {hint}there are {', '.join(BUILTIN)}")
    if data is not None:
        raise ConfigError(f"task {name!r} makes its own rows and takes no data file; leave out {data!r}")
    from t2ray.tasks import tiny, tiny_vision

    return tiny.task(name) if name in _TINY else tiny_vision.task(name)
