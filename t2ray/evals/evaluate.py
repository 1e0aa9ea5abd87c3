"""Runs both passes over a task's examples, and builds the tables of a report. No torch.

It takes callables: a strategy (pass 1), a `Generate` (pass 2) and a verifier. Not here: what the tables look like
(`report.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from t2ray.adapt.strategies import Strategy
from t2ray.core import ConfigError, DataError, Example, Generate, Message, Mixture, SamplingParams
from t2ray.evals.intervals import wilson
from t2ray.grades import Verify

_MOST_ROWS = 256
_CHARS_PER_TOKEN = 3  # of English or code they are about 4, of some languages fewer

METHODS = ("base", "expert", "oracle", "prompt", "cls", "fewshot")
"""The columns of a table, in their order; `methods` says what each is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The result of one task under one strategy.

    `correct` has one entry per example, in order, so that two cells of a task can be compared example by example.
    `labels` counts the labels that pass 1 chose. `truncated` is the number of answers that reached max_tokens,
    `too_long` that of prompts that do not fit the model; these count as wrong. Seconds are wall-clock time without the
    verifier.
    """

    task: str
    correct: tuple[bool, ...]
    labels: Counter[str] = field(default_factory=Counter)
    pass1_s: float = 0.0
    pass2_s: float = 0.0
    truncated: int = 0
    too_long: int = 0

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def acc(self) -> float:
        return sum(self.correct) / self.n

    @property
    def ci95(self) -> tuple[float, float]:
        return wilson(sum(self.correct), self.n)

    def row(self) -> dict[str, Any]:
        """Returns the cell as `report.json` shows it: accuracy, number of examples, 95 % interval."""
        return {"acc": self.acc, "n": self.n, "ci95": list(self.ci95)}


async def evaluate(
    task_name: str,
    examples: Sequence[Example],
    strategy: Strategy,
    generate: Generate,
    verify: Verify,
    sampling: SamplingParams,
    *,
    fits: Callable[[tuple[Message, ...]], bool] | None = None,
    batch_tokens: int = 16_384,
    progress: Callable[[int], None] | None = None,
) -> Cell:
    """Answers every example in two passes and verifies the answers; the verifier says which are right.

    The requests of a chunk are awaited together, pass by pass, so that each pass is one batch. Prompts of like length
    share a chunk, the longest ones first: what is left never takes more memory than what was done.

    Args:
        fits: says whether a conversation fits the model in both passes; None if all of them do.
        batch_tokens: the number of tokens of a chunk, roughly, by which memory is bounded.
        progress: is called with the number of examples done, at the beginning and after each chunk.

    Raises:
        ConfigError: the model's chat template refuses an example, which is named.
        DataError: there are no examples.
    """
    if not examples:
        raise DataError(f"task {task_name!r} has no examples to evaluate")
    right: set[str] = set()
    done = 0
    labels: Counter[str] = Counter()
    pass1_s = pass2_s = 0.0
    truncated = too_long = 0
    if progress is not None:
        progress(0)
    for rows in _chunks(examples, batch_tokens, sampling.max_tokens):
        fitting = [example for example in rows if fits is None or _fits(fits, example)]
        start = time.perf_counter()
        dispatches = await asyncio.gather(*(strategy(example.messages) for example in fitting))
        middle = time.perf_counter()
        completions = await asyncio.gather(
            *(generate(x.messages, d.mixture, sampling) for x, d in zip(fitting, dispatches, strict=True))
        )
        end = time.perf_counter()
        grades = await verify([c.text for c in completions], [x.row for x in fitting])
        right |= {x.id for x, grade in zip(fitting, grades, strict=True) if grade.right}
        labels.update(d.label for d in dispatches if d.label is not None)
        pass1_s += middle - start
        pass2_s += end - middle
        truncated += sum(c.finish_reason == "length" for c in completions)
        too_long += len(rows) - len(fitting)
        done += len(rows)
        if progress is not None:
            progress(done)
    return Cell(
        task=task_name, correct=tuple(example.id in right for example in examples), labels=labels, pass1_s=pass1_s,
        pass2_s=pass2_s, truncated=truncated, too_long=too_long,
    )  # fmt: skip


def _fits(fits: Callable[[tuple[Message, ...]], bool], example: Example) -> bool:
    try:
        return fits(example.messages)
    except ConfigError as error:  # a conversation that the model's chat template refuses
        raise ConfigError(f"{example.id}: {error}") from None


def _chunks(examples: Sequence[Example], tokens: int, answer: int) -> Iterator[list[Example]]:
    """Yields the examples in chunks of about so many tokens, the longest prompts first."""
    chars = {x.id: sum(len(message.content) for message in x.messages) for x in examples}
    chunk: list[Example] = []
    most = 0
    for example in sorted(examples, key=lambda x: -chars[x.id]):
        if len(chunk) == most:
            if chunk:
                yield chunk
            chunk, most = [], min(_MOST_ROWS, max(1, tokens // (chars[example.id] // _CHARS_PER_TOKEN + answer)))
        chunk.append(example)
    yield chunk


async def dispatch_counts(examples: Sequence[Example], strategy: Strategy) -> Counter[str]:
    """Counts the labels that pass 1 chooses for examples: a confusion matrix' row for prompts of no task ("others")."""
    dispatches = await asyncio.gather(*(strategy(example.messages) for example in examples))
    return Counter(d.label for d in dispatches if d.label is not None)


def confusion(counts: Mapping[str, Mapping[str, int]], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Returns the confusion matrix `{task: {label: count}}`, with all labels in the order of `labels`."""
    return {task: {label: row.get(label, 0) for label in labels} for task, row in counts.items()}


def methods(singles: Mapping[str, Cell], own: str | None, adaptive: Mapping[str, Cell]) -> dict[str, Cell]:
    """Returns a task's row of the table: method -> cell, in the order of `METHODS`, without methods that were not run.

    `expert` is the task's own expert, or that of the trained task whose sibling it is. `oracle` is the best on these
    very examples of the base model and all single experts: the bound for any dispatcher that decides once per task,
    chosen with knowledge of the answers. Of equal ones, the first is taken.

    Args:
        singles: "base" or an expert's name -> the cell of that mixture alone.
        own: the expert meant by `expert`; None for a task without one.
        adaptive: "prompt", "cls" or "fewshot" -> its cell.
    """
    row = dict(adaptive)
    if "base" in singles:
        row["base"] = singles["base"]
    if own is not None and own in singles:
        row["expert"] = singles[own]
    if len(singles) > 1:
        row["oracle"] = singles[oracle_choice(singles)]
    return {name: row[name] for name in METHODS if name in row}


def oracle_choice(singles: Mapping[str, Cell]) -> str:
    """Returns the name of the single mixture with the highest accuracy, of equal ones the first."""
    return max(singles, key=lambda name: singles[name].acc)


def build_report(
    *,
    trained: Sequence[str],
    own: Mapping[str, str],
    singles: Mapping[str, Mapping[str, Cell]],
    adaptive: Mapping[str, Mapping[str, Cell]],
    labels: Sequence[str],
    others: Mapping[str, Mapping[str, int]],
    classifier: Mapping[str, Cell],
    mixtures: Mapping[str, Mixture],
    experts: Sequence[str],
    timing_s: Mapping[str, float],
    pass1_share: float | None,
    seed: int,
    machine: Any,
) -> dict[str, Any]:
    """Returns the dictionary that is written as `report.json`.

    Args:
        trained: the tasks that experts were trained on; all other tasks are unseen ones.
        own: task -> its own expert, or its trained sibling's.
        singles: task -> mixture name ("base" or an expert) -> cell.
        adaptive: task -> strategy ("prompt", "cls", "fewshot") -> cell.
        labels: the dispatcher's labels, in their order.
        others: strategy -> label counts of prompts that fit no domain (`dispatch_counts`); may be empty.
        classifier: "base" and "expert" -> cell of the classification task itself; may be empty.
        mixtures: task -> the mixture that the few-shot search found for it.
        timing_s: stage -> seconds.
        pass1_share: time of pass 1 divided by that of pass 2 at 64 new tokens; None if it was not measured.
    """
    tables: dict[str, dict[str, dict[str, Any]]] = {"trained": {}, "unseen": {}}
    details: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, Mapping[str, int]]] = {}
    for task in dict.fromkeys([*singles, *adaptive]):
        alone, adapted = singles.get(task, {}), adaptive.get(task, {})
        row = methods(alone, own.get(task), adapted)
        tables["trained" if task in trained else "unseen"][task] = {name: cell.row() for name, cell in row.items()}
        details[task] = {name: _detail(cell) for name, cell in {**alone, **adapted}.items()}
        for name, cell in adapted.items():
            if cell.labels:
                counts.setdefault(name, {})[task] = cell.labels
    for name, row_of_others in others.items():
        counts.setdefault(name, {})["others"] = row_of_others
    report: dict[str, Any] = {
        "tables": tables,
        "choices": {
            task: {"expert": own.get(task), "oracle": oracle_choice(alone) if len(alone) > 1 else None}
            for task, alone in singles.items()
        },
        "confusion": {name: confusion(rows, labels) for name, rows in counts.items()},
        "classifier": {name: cell.row() for name, cell in classifier.items()},
        "mixtures": {task: {name: _alpha(mixture, name) for name in experts} for task, mixture in mixtures.items()},
        "timing_s": dict(timing_s),
        "pass1_share": pass1_share,
        "seed": seed,
        "machine": machine,
        "details": details,
    }
    return report | {"targets": targets(report)}


def _detail(cell: Cell) -> dict[str, Any]:
    return cell.row() | {
        "pass1_s": cell.pass1_s,
        "pass2_s": cell.pass2_s,
        "truncated": cell.truncated,
        "too_long": cell.too_long,
    }


def _alpha(mixture: Mixture, name: str) -> float | list[float]:
    alpha = dict(mixture.weights).get(name, (0.0,))
    return alpha[0] if len(alpha) == 1 else list(alpha)


def targets(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the targets of the tiny model that were measured, each as `{name, target, value, met}`.

    "The best expert" of the unseen tasks is each task's own oracle, the strictest reading.
    """
    trained, unseen = report["tables"]["trained"], report["tables"]["unseen"]
    rows: list[dict[str, Any]] = []

    def at_least(name: str, target: float, value: float) -> None:
        value = round(value, 9)  # 0.95 - 0.55 is below 0.4 in floating point
        rows.append({"name": f"{name}, at least", "target": target, "value": value, "met": value >= target})

    classifier = {"dispatch": report["classifier"]} if report["classifier"] else {}
    for task, row in (trained | classifier).items():
        if "expert" in row and "base" in row:
            at_least(f"{task}: accuracy of its expert", 0.80, row["expert"]["acc"])
            at_least(f"{task}: its expert above the base", 0.40, row["expert"]["acc"] - row["base"]["acc"])
    means = _means(trained)
    dispatched = [means[name] for name in ("prompt", "cls") if name in means]
    if dispatched and means.get("oracle", 0.0) > 0:
        at_least("trained tasks: the better of prompt and cls over oracle", 0.95, max(dispatched) / means["oracle"])
    means = _means(unseen)
    if {"fewshot", "base", "oracle"} <= means.keys():
        gain = round(min(row["fewshot"]["acc"] - row["base"]["acc"] for row in unseen.values()), 9)
        name = "unseen tasks: the smallest gain of fewshot over base, above"
        rows.append({"name": name, "target": 0.0, "value": gain, "met": gain > 0})
        at_least("unseen tasks: mean of fewshot against that of the best expert", means["oracle"], means["fewshot"])
    share = report["pass1_share"]
    if share is not None:
        name = "pass 1 as a share of pass 2 at 64 new tokens, at most"
        rows.append({"name": name, "target": 0.10, "value": share, "met": share <= 0.10})
    return rows


def _means(table: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns method -> mean accuracy over a table's tasks, for each method that all tasks have."""
    return {
        method: fmean(row[method]["acc"] for row in table.values())
        for method in METHODS
        if table and all(method in row for row in table.values())
    }
