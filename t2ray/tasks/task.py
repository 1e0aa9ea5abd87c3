"""What a task is: rows, a prompt per row, and a reward function that grades completions. Standard library only.

Each data set has a module of its own. `verifier` runs the reward functions, in processes of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import site
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from t2ray.core import ConfigError, DataError, Example, Message

LONGEST = 512
"""The tokens of an answer for which neither the user nor a built-in task sets a limit, as far as the context goes."""

SPLITS = ("train", "validation", "test", "all")

DataRow = Mapping[str, Any]
"""One row of a task's data: column -> value."""

Reward = Callable[[str, dict[str, Any]], float]
"""`reward(completion, row)` in [-1, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: `Task(name="gsm8k", rows=..., messages=..., reward="t2ray.tasks.gsm8k:reward", max_tokens=512, ...)`.

    `rows(split)` returns the rows of "train", "validation" or "test", which share no row unless the task's module says
    so; `rows("all")` returns every row. `messages(row)` returns its prompt. `reward` names a function `(completion:
    str, row: dict) -> float in [-1, 1]` as "module:function", or several with their weights; a reward above
    `success_above` counts as right. `gold(row)` returns a completion that must score +1; it is None if the task has no
    right answers; where people disagree, it scores `best(row)`, which is less. `max_tokens` limits a completion; with
    `to_end` it is lowered to what the context has room for. `places(split)` says for people where each row of a split
    is from, such as "d.jsonl, line 3". `notes` say what the user should know of how the rows were read.

    `reading(completion, row)` returns what the verifier takes a completion to answer ("B", "72"), or None if it takes
    nothing from it; a task without it is read as the whole completion. A task of multiple choice has `choices(row)`,
    the readings that a row allows, and where their order means nothing `shuffle(row, rng)`, the row with its choices
    in another order and the right answer with them. `test_is_unseen` is False if the rows of "test" are those of
    "validation", by which training chooses its expert.
    """

    name: str
    rows: Callable[[str], Sequence[DataRow]]
    messages: Callable[[DataRow], tuple[Message, ...]]
    reward: str | Mapping[str, float]
    gold: Callable[[DataRow], str] | None
    max_tokens: int
    to_end: bool = True
    success_above: float = 0.0
    places: Callable[[str], Sequence[str]] | None = None
    notes: tuple[str, ...] = ()
    reading: Callable[[str, DataRow], str | None] = lambda completion, row: completion.strip()
    choices: Callable[[DataRow], Sequence[str]] | None = None
    shuffle: Callable[[DataRow, random.Random], DataRow] | None = None
    best: Callable[[DataRow], float] = lambda row: 1.0
    test_is_unseen: bool = True

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

    def gold_readings(self, examples: Sequence[Example]) -> list[str | None]:
        """Returns what the verifier reads from the right answer of each example; none if the task has no golds."""
        return [] if self.gold is None else [self.reading(self.gold(x.row), x.row) for x in examples]

    def options(self, examples: Sequence[Example]) -> list[int]:
        """Returns the number of choices of each example; none if the task is no multiple choice."""
        return [] if self.choices is None else [len(self.choices(x.row)) for x in examples]

    def with_shots(self, count: int, seed: int) -> Task:
        """Returns the task whose prompts begin with solved rows of the training split, the same for all of them.

        A training row's own prompt has another one in its place.

        Raises:
            ConfigError: the task has no right answers, or too few training rows.
        """
        rows, gold = self.rows("train"), self.gold
        if gold is None or len(rows) <= count:
            what = "no right answers" if gold is None else f"only {len(rows)} training rows"
            raise ConfigError(f"task {self.name!r} has {what}; it cannot show {count} solved ones before a prompt")
        shown = [
            (prompt, Message(role="assistant", content=gold(row)))
            for row in random.Random(f"shots/{seed}").sample(list(rows), count + 1)
            for prompt in [self.messages(row)]
        ]

        def messages(row: DataRow) -> tuple[Message, ...]:
            asked = self.messages(row)
            before = [(*prompt, answer) for prompt, answer in shown if prompt != asked][:count]
            return (*(message for turns in before for message in turns), *asked)

        return replace(self, messages=messages)

    def shuffled(self, example: Example, seed: int | str) -> Example:
        """Returns an example with its choices in an order drawn from `seed`; the example itself if it has none."""
        if self.shuffle is None:
            return example
        row = self.shuffle(example.row, random.Random(seed))
        return replace(example, messages=self.messages(row), row=row)


def load_reward(reward: str, folder: str | None = None) -> Reward:
    """Imports the function that "module:function" names, from `folder` first.

    `folder` stays on `sys.path`, because a reward module may import its neighbours later.

    Raises:
        ConfigError: `reward` has no colon, the module cannot be found or imported, shares its name with a library, or
            has no such function.
    """
    module_name, colon, function_name = reward.partition(":")
    if not colon or not module_name or not function_name:
        raise ConfigError(f"reward {reward!r} is not of the form module:function; write for instance rewards:has_dog")
    top = module_name.partition(".")[0]
    if folder is not None:
        _put_first(folder, top, reward)
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        where = f"{folder} or " if folder else ""
        raise ConfigError(f"reward {reward!r}: no module {module_name!r} in {where}the packages; add {top}.py there")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything, or end
        exited = f"it called sys.exit({error.code!r})" if isinstance(error, SystemExit) else ""
        reason = exited or f"{type(error).__name__}: {error}"
        if folder is not None and (shadows := [path.name for path in Path(folder).glob("*.py") if _library(path.stem)]):
            reason += f"; {', '.join(shadows)} in {folder} shares its name with a library, which Python then misses"
        what = f"reward {reward!r}: importing {module_name!r} failed: {reason}"
        raise ConfigError(" ".join(what.split())) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = sorted(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
        raise ConfigError(
            f"reward {reward!r}: {module_name} has no function {function_name!r}; it has {', '.join(known) or 'none'}"
        )
    loaded: Reward = function
    return loaded


def _put_first(folder: str, top: str, reward: str) -> None:
    """Makes `folder` the first place where Python looks beside its own library, so that `top` is imported from there.

    Raises:
        ConfigError: the module shares its name with a library.
    """
    own_library = sysconfig.get_path("stdlib")  # first: a random.py in the folder would end every process that starts
    standard = [path for path in sys.path if path.startswith(own_library) and "site-packages" not in path]
    places = [*standard, folder, *(path for path in sys.path if path != folder and path not in standard)]
    if sys.path != places:
        sys.path[:] = places
        importlib.invalidate_caches()
    own = PathFinder.find_spec(top, [folder])
    if own is None or own.origin is None:
        return
    if top == __name__.partition(".")[0] and own.submodule_search_locations:
        return  # a checkout of t2ray, as a submitted job's folder is: the package that runs is loaded already
    if _library(top):
        raise ConfigError(
            f"reward {reward!r}: {own.origin} shares its name with a library; rename it, such as to {top}_rewards.py"
        )
    other = getattr(sys.modules.get(top), "__file__", None)
    if other is not None and Path(other).resolve() != Path(own.origin).resolve():  # of another job's folder
        for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
            del sys.modules[name]


def _library(name: str) -> bool:
    """Whether Python, t2ray or an installed package has a module of that name."""
    places = [*site.getsitepackages(), site.getusersitepackages()]
    ours = __name__.partition(".")[0]
    return name == ours or name in sys.stdlib_module_names or PathFinder.find_spec(name, places) is not None
