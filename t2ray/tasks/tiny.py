"""The tiny model's tasks: four kinds of request. Three of them have a harder sibling that no expert is trained on.

| task | a prompt | the wanted completion | its sibling, not trained on |
| --- | --- | --- | --- |
| math | `17+25` | `42` | math_long: `17+8-5` |
| code | `add 3 to n` | `return n+3` | code_long: `add 3 to n then times 2` |
| pick | `larger? A 17 B 42` | `(B)` | pick_more: `middle? A 17 B 42 C 30` |
| others | `hello Anna, how are you?` | `I am fine, thank you!` | |

The wanted formats conflict on purpose: an expert that answers everything in its own format scores low elsewhere. Rows
are generated, the same in every process; no file is read or downloaded. Prompts that mean the same (`3+4` and `4+3`)
are in the same split, so that the accuracy on a split measures generalisation.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, permutations, product
from typing import Any

from t2ray.core import ConfigError, user
from t2ray.prompts import OTHERS
from t2ray.tasks.task import Task
from t2ray.tasks.tiny_code import long_programs, reward_code, short_programs

__all__ = ["LABELS", "PARENT", "SPLITS", "TASKS", "gold", "reward_code", "reward_dispatch", "reward_math",
           "reward_others", "reward_pick", "rows", "split_rows", "task"]  # fmt: skip

LABELS = ("math", "code", "pick", OTHERS)
PARENT = {"math_long": "math", "code_long": "code", "pick_more": "pick"}
SPLITS = ("train", "validation", "test")

_HELD_OUT = 500  # prompts of the validation split, and as many of the test split
_MOST = 13_000  # prompts of a task at most; the siblings have far more possible prompts

Grouped = Iterator[tuple[str, dict[str, Any]]]
"""(group, row); the rows of a group mean the same and stay in one split."""

# ---------------------------------------------------------------------------------------------------------- the prompts


def _math(largest: int = 50) -> Grouped:
    """Sums and differences of two numbers; no difference is negative."""
    for a, b in product(range(largest + 1), repeat=2):
        low, high = sorted((a, b))
        yield f"{low}+{high}", {"prompt": f"{a}+{b}", "answer": str(a + b)}
        if a >= b:
            yield f"{a}-{b}", {"prompt": f"{a}-{b}", "answer": str(a - b)}


def _math_long(largest: int = 20) -> Grouped:
    """Sums of three numbers, or of two with a third subtracted; no result is negative."""
    for a, b, c in product(range(largest + 1), repeat=3):
        yield "+".join(map(str, sorted((a, b, c)))), {"prompt": f"{a}+{b}+{c}", "answer": str(a + b + c)}
        if a + b >= c:
            low, high = sorted((a, b))
            yield f"{low}+{high}-{c}", {"prompt": f"{a}+{b}-{c}", "answer": str(a + b - c)}


def _pick() -> Grouped:
    """Which of two numbers is larger, or smaller; each pair in both orders."""
    for pair in combinations(range(10, 100), 2):
        for (a, b), (relation, wanted) in product(permutations(pair), (("larger", max), ("smaller", min))):
            letter = "A" if wanted(a, b) == a else "B"
            yield str(pair), {"prompt": f"{relation}? A {a} B {b}", "answer": f"({letter})"}


def _pick_more() -> Grouped:
    """Which of three numbers is the largest, the smallest or the middle one."""
    for triple in combinations(range(10, 100), 3):
        rng = random.Random(str(triple))
        numbers = rng.sample(triple, 3)
        rank, relation = rng.choice(((2, "larger"), (0, "smaller"), (1, "middle")))
        letter = "ABC"[numbers.index(sorted(numbers)[rank])]
        a, b, c = numbers
        yield str(triple), {"prompt": f"{relation}? A {a} B {b} C {c}", "answer": f"({letter})"}


_GREETINGS = ("hello", "hi", "hey", "good day", "dear")
_NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jonas", "Kim", "Lena", "Max", "Nora",
    "Oscar", "Paula", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Yara",
)  # fmt: skip
_TALK = {
    "I am fine, thank you!": ("how are you", "how do you do", "are you well", "how is your day", "all well with you"),
    "You are welcome!": ("thank you", "thanks a lot", "many thanks", "that was kind", "i am grateful"),
    "Goodbye!": ("goodbye", "see you soon", "i must go", "until tomorrow", "have a nice evening"),
    "Nice to meet you!": ("nice to meet you", "who are you", "we have not met", "may i join you", "i am new here"),
    "Sorry, I do not know.": ("what is the news", "will it rain", "tell me a joke", "where is the cat", "sing a song"),
    "I am sorry to hear that.": ("i am tired", "my head hurts", "i lost my keys", "the bus is late", "i feel sad"),
}


def _others() -> Grouped:
    """Small talk that fits no domain. The base model already answers it in the wanted way."""
    for greeting, name, (reply, lines) in product(_GREETINGS, _NAMES, _TALK.items()):
        for line in lines:
            yield f"{name} {line}", {"prompt": f"{greeting} {name}, {line}", "answer": reply}


_GENERATORS: dict[str, Callable[[], Grouped]] = {
    "math": _math,
    "math_long": _math_long,
    "code": short_programs,
    "code_long": long_programs,
    "pick": _pick,
    "pick_more": _pick_more,
    OTHERS: _others,
}
TASKS = tuple(_GENERATORS)

# ----------------------------------------------------------------------------------------------------------- the splits


def task(name: str) -> Task:
    """Returns the task of that name, which must be one of `TASKS`."""
    return Task(
        name=name,
        rows=lambda split: [row for part in SPLITS if split in (part, "all") for row in rows(name, part)],
        messages=lambda row: user(row["prompt"]),
        reward=f"t2ray.tasks.tiny:reward_{PARENT.get(name, name)}",
        gold=gold,
        max_tokens=24,
        choices=_LETTERS.get(name),
    )


_LETTERS: dict[str, Callable[[Mapping[str, Any]], tuple[str, ...]]] = {
    "pick": lambda row: ("(A)", "(B)"),
    "pick_more": lambda row: ("(A)", "(B)", "(C)"),
}


def rows(task: str, split: str) -> list[dict[str, Any]]:
    """Returns the rows of a split in a fixed random order: `{"prompt": "17+25", "answer": "42"}`.

    The rows of the code tasks also have what their reward needs.

    Raises:
        ConfigError: there is no such task or split.
    """
    return split_rows(task, split, TASKS, _splits)


def split_rows(
    task: str, split: str, tasks: Sequence[str], splits: Callable[[str], Mapping[str, list[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """Returns copies of the rows of one of the `splits` of a task.

    Raises:
        ConfigError: there is no such task among `tasks`, or no such split.
    """
    if task not in tasks:
        raise ConfigError(f"no tiny task {task!r}; there are {', '.join(tasks)}")
    if split not in SPLITS:
        raise ConfigError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    return [dict(row) for row in splits(task)[split]]


@functools.cache
def _splits(task: str) -> dict[str, list[dict[str, Any]]]:
    """Splits a task's rows. Whole groups go to test, then to validation, until each has enough; the rest is train."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for group, row in _GENERATORS[task]():
        groups.setdefault(group, []).append(row)
    rng = random.Random(f"tiny/{task}")
    names = list(groups)
    rng.shuffle(names)
    splits: dict[str, list[dict[str, Any]]] = {"test": [], "validation": [], "train": []}
    sizes = {"test": _HELD_OUT, "validation": _HELD_OUT, "train": _MOST - 2 * _HELD_OUT}
    for split, members in splits.items():
        while names and len(members) < sizes[split]:
            members.extend(groups[names.pop()])
        rng.shuffle(members)
    return splits


def gold(row: Mapping[str, Any]) -> str:
    """Returns the completion that scores +1."""
    return str(row["answer"])


# -------------------------------------------------------------------------------------------------------- the verifiers


def _exact(completion: str, row: Mapping[str, Any]) -> float:
    return 1.0 if completion.strip() == row["answer"] else -1.0


def reward_math(completion: str, row: Mapping[str, Any]) -> float:
    """+1 if the completion is the right number and nothing else (`42`), else -1."""
    return _exact(completion, row)


def reward_pick(completion: str, row: Mapping[str, Any]) -> float:
    """+1 if the completion is the right letter in brackets and nothing else (`(B)`), else -1."""
    return _exact(completion, row)


def reward_others(completion: str, row: Mapping[str, Any]) -> float:
    """+1 if the completion is the wanted reply and nothing else, else -1."""
    return _exact(completion, row)


def reward_dispatch(completion: str, row: Mapping[str, Any]) -> float:
    """+1 if the completion is the label of the request's kind and nothing else (`math`), else -1."""
    return _exact(completion, row)
