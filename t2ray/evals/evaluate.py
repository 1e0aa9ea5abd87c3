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
from types import MappingProxyType
from typing import Any

from t2ray.adapt.strategies import Dispatch, Strategy
from t2ray.core import Completion, ConfigError, DataError, Example, Generate, Message, Mixture, SamplingParams
from t2ray.evals.answers import Answers, Baseline, lopsided, shares
from t2ray.evals.intervals import wilson
from t2ray.evals.targets import METHODS, targets
from t2ray.grades import Verify, for_verifier

_MOST_ROWS = 256
_CHARS_PER_TOKEN = 3  # of English or code they are about 4, of some languages fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The result of one task under one strategy.

    `correct` has one entry per example, in order, so that two cells of a task can be compared example by example; None
    where the verifier abstained, which counts in no accuracy. `labels` counts the labels that pass 1 chose, `readings`
    what the verifier took the answers to be. `truncated` is the number of answers that reached max_tokens, `too_long`
    that of prompts that do not fit the model; these count as wrong. Seconds are wall-clock time without the verifier.
    """

    task: str
    correct: tuple[bool | None, ...]
    labels: Counter[str] = field(default_factory=Counter)
    readings: Counter[str] = field(default_factory=Counter)
    pass1_s: float = 0.0
    pass2_s: float = 0.0
    truncated: int = 0
    too_long: int = 0

    @property
    def abstained(self) -> int:
        return self.correct.count(None)

    @property
    def n(self) -> int:
        """The number of examples that the accuracy is over."""
        return len(self.correct) - self.abstained

    @property
    def acc(self) -> float | None:
        """The accuracy; None if the verifier abstained from all answers."""
        return self.correct.count(True) / self.n if self.n else None

    @property
    def ci95(self) -> tuple[float, float]:
        return wilson(self.correct.count(True), self.n)

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
    answers: Answers | None = None,
    progress: Callable[[int], None] | None = None,
) -> Cell:
    """Answers every example in two passes and verifies the answers; the verifier says which are right.

    The requests of a chunk are awaited together, pass by pass, so that each pass is one batch. Prompts of like length
    share a chunk, the longest ones first: what is left never takes more memory than what was done.

    Args:
        fits: says whether a conversation fits the model in both passes; None if all of them do.
        batch_tokens: the number of tokens of a chunk, roughly, by which memory is bounded.
        answers: gathers what was answered.
        progress: is called with the number of examples done, at the beginning and after each chunk.

    Raises:
        ConfigError: the model's chat template refuses an example, which is named.
        DataError: there are no examples.
    """
    if not examples:
        raise DataError(f"task {task_name!r} has no examples to evaluate")
    right: dict[str, bool | None] = {}
    done = 0
    labels: Counter[str] = Counter()
    pass1_s = pass2_s = 0.0
    truncated = too_long = 0
    if progress is not None:
        progress(0)
    for rows in _chunks(examples, batch_tokens, sampling.max_tokens):
        fitting = [example for example in rows if fits is None or _fits(fits, example)]
        dispatches, completions, seconds = await _both_passes(fitting, strategy, generate, sampling)
        grades = await verify(for_verifier(completions), [x.row for x in fitting])
        right |= {x.id: None if grade.reward is None else grade.right for x, grade in zip(fitting, grades, strict=True)}
        if answers is not None:
            answers.add(fitting, completions, grades)
        labels.update(d.label for d in dispatches if d.label is not None)
        pass1_s, pass2_s = pass1_s + seconds[0], pass2_s + seconds[1]
        truncated += sum(c.finish_reason == "length" for c in completions)
        too_long += len(rows) - len(fitting)
        done += len(rows)
        if progress is not None:
            progress(done)
    return Cell(
        task=task_name, correct=tuple(right.get(example.id, False) for example in examples), labels=labels,
        readings=answers.readings if answers is not None else Counter(), pass1_s=pass1_s, pass2_s=pass2_s,
        truncated=truncated, too_long=too_long,
    )  # fmt: skip


def _fits(fits: Callable[[tuple[Message, ...]], bool], example: Example) -> bool:
    try:
        return fits(example.messages)
    except ConfigError as error:  # a conversation that the model's chat template refuses
        raise ConfigError(f"{example.id}: {error}") from None


async def _both_passes(
    examples: Sequence[Example], strategy: Strategy, generate: Generate, sampling: SamplingParams
) -> tuple[list[Dispatch], list[Completion], tuple[float, float]]:
    """Returns what pass 1 chose, what pass 2 answered, and the seconds that each took."""
    start = time.perf_counter()
    dispatches = await asyncio.gather(*(strategy(example.messages) for example in examples))
    middle = time.perf_counter()
    completions = await asyncio.gather(
        *(generate(x.messages, d.mixture, sampling) for x, d in zip(examples, dispatches, strict=True))
    )
    return dispatches, completions, (middle - start, time.perf_counter() - middle)


def _chunks(examples: Sequence[Example], tokens: int, answer: int) -> Iterator[list[Example]]:
    """Yields the examples in chunks of about so many tokens, the longest prompts first."""
    chars = {x.id: sum(len(m.text) + 2_000 * len(m.images) for m in x.messages) for x in examples}
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
    return max(singles, key=lambda name: singles[name].acc or 0.0)


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
    baselines: Mapping[str, Baseline] = MappingProxyType({}),
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
        baselines: task -> what a constant and a random answer would score.
    """
    tables: dict[str, dict[str, dict[str, Any]]] = {"trained": {}, "unseen": {}}
    details: dict[str, dict[str, Any]] = {}
    alike: list[str] = []
    for task in dict.fromkeys([*singles, *adaptive]):
        alone, adapted = singles.get(task, {}), adaptive.get(task, {})
        row = methods(alone, own.get(task), adapted)
        tables["trained" if task in trained else "unseen"][task] = {name: cell.row() for name, cell in row.items()}
        alike += warnings(task, {**alone, **adapted}, baselines.get(task))
        details[task] = {name: _detail(cell, baselines.get(task)) for name, cell in {**alone, **adapted}.items()}
    report: dict[str, Any] = {
        "tables": tables,
        "baselines": {task: baseline.row() for task, baseline in baselines.items()},
        "warnings": alike,
        "choices": _choices(singles, own),
        "confusion": {name: confusion(rows, labels) for name, rows in _counts(adaptive, others).items()},
        "classifier": {name: cell.row() for name, cell in classifier.items()},
        "mixtures": {task: {name: _alpha(mixture, name) for name in experts} for task, mixture in mixtures.items()},
        "timing_s": dict(timing_s),
        "pass1_share": pass1_share,
        "seed": seed,
        "machine": machine,
        "details": details,
    }
    return report | {"targets": targets(report)}


def _counts(
    adaptive: Mapping[str, Mapping[str, Cell]], others: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, Mapping[str, int]]]:
    """Returns strategy -> task -> the labels that pass 1 chose."""
    counts: dict[str, dict[str, Mapping[str, int]]] = {}
    for task, row in adaptive.items():
        for name, cell in row.items():
            if cell.labels:
                counts.setdefault(name, {})[task] = cell.labels
    for name, labels in others.items():
        counts.setdefault(name, {})["others"] = labels
    return counts


def _choices(singles: Mapping[str, Mapping[str, Cell]], own: Mapping[str, str]) -> dict[str, dict[str, str | None]]:
    """Returns task -> which mixtures `expert` and `oracle` are."""
    return {
        task: {"expert": own.get(task), "oracle": oracle_choice(alone) if len(alone) > 1 else None}
        for task, alone in singles.items()
    }


def warnings(task: str, cells: Mapping[str, Cell], baseline: Baseline | None) -> list[str]:
    """Returns a line for each strategy that answers nearly everything alike: its accuracy is no knowledge."""
    golds = baseline.golds if baseline else Counter[str]()
    lines = {name: lopsided(cell.readings, golds) for name, cell in cells.items()}
    return [f"{task} {name}: {line}" for name, line in lines.items() if line]


def _detail(cell: Cell, baseline: Baseline | None) -> dict[str, Any]:
    return cell.row() | {
        "pass1_s": cell.pass1_s,
        "pass2_s": cell.pass2_s,
        "truncated": cell.truncated,
        "too_long": cell.too_long,
        "abstained": cell.abstained,
        "readings": shares(cell.readings, baseline.golds if baseline else ()),
    }


def _alpha(mixture: Mixture, name: str) -> float | list[float]:
    alpha = dict(mixture.weights).get(name, (0.0,))
    return alpha[0] if len(alpha) == 1 else list(alpha)
