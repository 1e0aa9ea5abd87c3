"""What a task is: rows, a prompt per row, and a reward function that grades completions. Standard library only.

Each data set has a module of its own. `verifier` runs the reward functions, in processes of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2ray.core import ConfigError, DataError, Example, Message

SPLITS = ("train", "validation", "test", "all")

DataRow = Mapping[str, Any]
"""One row of a task's data: column -> value."""

Reward = Callable[[str, dict[str, Any]], float]
"""`reward(completion, row)` in [-1, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: `Task(name="gsm8k", rows=..., messages=..., reward="t2ray.tasks.gsm8k:reward", max_tokens=512, ...)`.

    `rows(split)` returns the rows of "train", "validation" or "test", which share no row unless the task's module says
    so; `rows("all")` returns every row. `messages(row)` returns its prompt. `reward` names a function
    `(completion: str, row: dict) -> float in [-1, 1]` as "module:function". `gold(row)` returns a completion that must
    score +1; it is None if the task has no right answers. `max_tokens` limits a completion.
    """

    name: str
    rows: Callable[[str], Sequence[DataRow]]
    messages: Callable[[DataRow], tuple[Message, ...]]
    reward: str
    gold: Callable[[DataRow], str] | None
    max_tokens: int

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """Returns the first `limit` rows of a split (all if None) as examples with the ids `name/split/i`.

        Raises:
            ConfigError: there is no such split.
            DataError: the split has no rows, or the rows cannot be read.
        """
        if split not in SPLITS:
            raise ConfigError(f"no split {split!r}; a task has {', '.join(SPLITS)}")
        rows = self.rows(split)
        if not rows:
            raise DataError(f"task {self.name!r} has no rows in its {split} split; give it a larger file")
        return [
            Example(id=f"{self.name}/{split}/{i}", messages=self.messages(row), row=row)
            for i, row in enumerate(rows[:limit])
        ]


def load_reward(reward: str, folder: str | None = None) -> Reward:
    """Imports the function that "module:function" names, with `folder` first on `sys.path`.

    `folder` stays there, because a reward module may import its neighbours later.

    Raises:
        ConfigError: `reward` has no colon, the module cannot be found or imported, or it has no such function.
    """
    module_name, colon, function_name = reward.partition(":")
    if not colon or not module_name or not function_name:
        raise ConfigError(f"reward {reward!r} is not of the form module:function; write for instance rewards:has_dog")
    if folder is not None and folder not in sys.path:
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
    top = module_name.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        where = f"{folder} or " if folder else ""
        raise ConfigError(f"reward {reward!r}: no module {module_name!r} in {where}the packages; add {top}.py there")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"reward {reward!r}: importing {module_name!r} failed: {reason}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = sorted(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
        raise ConfigError(
            f"reward {reward!r}: {module_name} has no function {function_name!r}; it has {', '.join(known) or 'none'}"
        )
    loaded: Reward = function
    return loaded
