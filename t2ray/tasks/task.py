"""What a task is: rows, a prompt, and a verifier that says how good an answer is. Standard library only.

Not here: any data (each data set has its module), any process (`verifier` runs the reward functions), and the model's
chat template (`t2ray.models.chat` applies it to the messages). Training, adaptation, evaluation and `t2ray verify`
all take a `Task` and ask nothing else about where its rows come from.
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
Reward = Callable[[str, dict[str, Any]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: `Task(name="gsm8k", rows=..., messages=..., reward="t2ray.tasks.gsm8k:reward", max_tokens=512, ...)`.

    `rows(split)` gives the rows of "train", "validation" or "test", which share none unless the task's module says so,
    and every row it has for "all". `reward` names a function `(completion: str, row: dict) -> float in [-1, 1]` that a
    verifier process can import. `gold` writes the completion that must score +1, or is None where a row has none.
    """

    name: str
    rows: Callable[[str], Sequence[DataRow]]
    messages: Callable[[DataRow], tuple[Message, ...]]
    reward: str
    gold: Callable[[DataRow], str] | None
    max_tokens: int

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """The first `limit` rows of a split (all when None), with ids `name/split/i`.

        Raises:
            ConfigError: no such split.
            DataError: the split has no rows, or a row is not what the task needs.
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
    """The function that `"module:function"` names, imported with `folder` first on `sys.path`.

    `folder` stays there, because a reward module may import its neighbours later.

    Raises:
        ConfigError: the text has no colon, the module cannot be found, or it has no such function.
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
