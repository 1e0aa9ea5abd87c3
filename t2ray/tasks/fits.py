"""Which prompts of a task are too long for a model, by file and line, and the task without them.

A prompt fits if it and the longest answer are within the model's context; where an answer may end at the context, one
token of an answer is enough. `t2ray.engine` goes by the same rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from t2ray.core import ConfigError, DataError, Example, Message
from t2ray.tasks.task import DataRow, Task

SPLITS = ("train", "validation")
TRAINING: Mapping[str, int | None] = dict.fromkeys(SPLITS)
_SHOWN = 3

CountTokens = Callable[[Sequence[Message]], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LongPrompts:
    """The prompts of a task that are too long.

    `rows` has the tokens of each by its row, by split; `of` has the number of all rows of a split. `text` says how many
    there are and where the first are.
    """

    rows: Mapping[str, Mapping[int, int]]
    of: Mapping[str, int]
    text: str


def long_prompts(
    task: Task, tokens: CountTokens, context: int, splits: Mapping[str, int | None] = TRAINING
) -> LongPrompts | None:
    """Returns the prompts of a task that are too long for a context of so many tokens, or None if there are none.

    Args:
        splits: which splits are looked at, each with the number of its first rows; None means all.

    Raises:
        DataError: the model's chat template refuses a conversation, whose place is named.
    """
    answer = 1 if task.to_end else task.max_tokens
    rows: dict[str, dict[int, int]] = {}
    of, shown = {}, []
    for split, limit in splits.items():
        examples = task.examples(split, limit)
        places = task.places(split) if task.places else [example.id for example in examples]
        lengths = [_length(tokens, *pair) for pair in zip(places, examples, strict=False)]
        rows[split] = {i: length for i, length in enumerate(lengths) if length + answer > context}
        of[split] = len(examples)
        shown += [f"{places[i]} ({length} tokens)" for i, length in rows[split].items()]
    if not shown:
        return None
    counts = " and ".join(f"{len(rows[split])} of {of[split]} of {split}" for split in splits if rows[split])
    first = ", ".join(dict.fromkeys(shown[:_SHOWN])) + (", ..." if len(shown) > _SHOWN else "")
    most = f"the model's context of {context} tokens with {answer} for the answer"
    return LongPrompts(rows=rows, of=of, text=f"prompts too long for {most}: {counts}: {first}")


def _length(tokens: CountTokens, place: str, example: Example) -> int:
    try:
        return tokens(example.messages)
    except ConfigError as error:
        raise DataError(f"{place}: {error}") from None


def without(task: Task, long: LongPrompts) -> Task:
    """Returns the task without the prompts that are too long.

    Raises:
        DataError: none is left.
    """
    for split in long.rows:
        if len(long.rows[split]) == long.of[split]:
            raise DataError(f"task {task.name!r}: {long.text}; none is left in its {split} split")

    def kept(split: str) -> Sequence[DataRow]:
        gone = long.rows.get(split, {})
        return [row for i, row in enumerate(task.rows(split)) if i not in gone]

    return replace(task, rows=kept, places=None)
