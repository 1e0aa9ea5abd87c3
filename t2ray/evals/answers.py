"""What was answered: how often which reading, what a constant and a random answer would score, the file of answers.

A *reading* is what a verifier takes a completion to answer ("C", "72"). An expert that answers "C" to everything may
score above the base; only its readings show that it learned a form and no knowledge. No torch.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from t2ray.core import Completion, Example, Generate, Message, Mixture, Prompt, SamplingParams, Score, Token
from t2ray.evals.intervals import wilson
from t2ray.grades import Grade

NONE = "(none)"
_MOST_CHARS = 60
_MOST_READINGS = 10

Reading = Callable[[str, Mapping[str, Any]], str | None]
"""`reading(completion, row)`: what a verifier takes a completion to answer; None for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One answered example: a row of the file of answers.

    `reading` is None if the verifier takes nothing from the completion, `gold` if the task has no right answers,
    `reward` if the verifier abstains.
    """

    task: str
    strategy: str
    id: str
    prompt: str
    completion: str
    reading: str | None
    gold: str | None
    reward: float | None


def short(reading: str | None) -> str:
    """Returns a reading as tables show it: on one line, of at most 60 characters; "(none)" for None."""
    if reading is None:
        return NONE
    line = " ".join(reading.split())
    return line if len(line) <= _MOST_CHARS else line[: _MOST_CHARS - 3] + "..."


class Answers:
    """Gathers the answers of a task under a strategy: `readings` counts what they were taken to be.

    Args:
        reading: returns what the verifier takes a completion for a row to answer, None for nothing.
        gold: returns a row's right answer; None for a task without any.
        keep: whether `rows` keeps every answer.
    """

    def __init__(
        self, task: str, strategy: str, reading: Reading, gold: Callable[[Mapping[str, Any]], str] | None, *, keep: bool
    ) -> None:
        self.task, self.strategy, self.reading, self.gold, self.keep = task, strategy, reading, gold, keep
        self.readings: Counter[str] = Counter()
        self.rows: list[Answered] = []

    def add(self, examples: Sequence[Example], completions: Sequence[Completion], grades: Sequence[Grade]) -> None:
        """Takes what was answered to some examples."""
        for example, completion, grade in zip(examples, completions, grades, strict=True):
            read = self.reading(completion.text, example.row)
            self.readings[short(read)] += 1
            if self.keep:
                gold = self.gold and self.gold(example.row)
                answer = Answered(
                    task=self.task, strategy=self.strategy, id=example.id, prompt=text_of(example.messages),
                    completion=completion.text, reading=read, gold=gold, reward=grade.reward,
                )  # fmt: skip
                self.rows.append(answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What needs no model: `Baseline(golds=Counter(A=30, C=70), random=0.25)`.

    `golds` counts the readings of the right answers; it is empty if the task has none. `random` is the expected
    accuracy of a choice at random; None if the task is no multiple choice.
    """

    golds: Counter[str] = field(default_factory=Counter)
    random: float | None = None

    @classmethod
    def of(cls, golds: Sequence[str | None], options: Sequence[int]) -> Baseline:
        """From the golds' readings, and the number of choices of each example."""
        return cls(
            golds=Counter(map(short, golds)), random=sum(1 / n for n in options) / len(options) if options else None
        )

    def row(self) -> dict[str, Any]:
        """Returns `{"majority": {"acc", "n", "ci95", "reading"} or None, "random": 0.25 or None, "golds": {...}}`."""
        majority = None
        for reading, k in self.golds.most_common(1):
            n = self.golds.total()
            majority = {"acc": k / n, "n": n, "ci95": list(wilson(k, n)), "reading": reading}
        return {"majority": majority, "random": self.random, "golds": shares(self.golds)}


def baseline_cells(row: Mapping[str, Any]) -> list[str]:
    """Returns what tables show of a `Baseline.row()`: the majority's accuracy with its reading, and that of chance."""
    majority, random = row.get("majority"), row.get("random")
    return [
        f"{100 * majority['acc']:.1f} {majority['reading']}" if majority else "-",
        "-" if random is None else f"{100 * random:.1f}",
    ]


def shares(counts: Mapping[str, int], golds: Collection[str] = ()) -> dict[str, int]:
    """Returns the ten most frequent readings and the `golds` with their counts; "..." counts all others together."""
    ordered = Counter(counts).most_common()
    shown = dict(pair for i, pair in enumerate(ordered) if i < _MOST_READINGS or pair[0] in golds)
    rest = sum(counts.values()) - sum(shown.values())
    return shown | ({"...": rest} if rest else {})


def lopsided(readings: Counter[str], golds: Counter[str]) -> str | None:
    """Returns a warning if one reading has most of the answers and the right answers do not explain it; or None.

    Most is more than halfway from the reading's share of the right answers to all: over 62.5 % where it is right in a
    quarter of the rows, over half where it is never right or no right answers are known. The answers of a task that has
    one right answer for everything warn of nothing.
    """
    n = readings.total()
    if n < 10:
        return None
    reading, k = readings.most_common(1)[0]
    right = golds[reading] / golds.total() if golds else 0.0
    if k / n <= (1 + right) / 2 or wilson(k, n)[0] <= right:
        return None
    what = "hold no answer that the verifier can read" if reading == NONE else f"are {reading!r}"
    known = f"; of the right answers, {right:.0%} are" if golds and reading != NONE else ""
    return f"{k} of {n} answers {what}{known}"


def choosing(score: Score, choices: Mapping[Prompt, tuple[str, ...]]) -> Generate:
    """Returns a `Generate` that answers a prompt with the likeliest of its choices, of equal ones the first.

    Args:
        choices: the readings that each prompt allows; a prompt that is not there cannot be answered.
    """

    async def generate(prompt: Prompt, mixture: Mixture, sampling: SamplingParams, /) -> Completion:
        labels = choices[prompt]
        likelihoods = await score(prompt, labels, mixture)
        best = max(range(len(labels)), key=likelihoods.__getitem__)
        token = Token(id=0, text=labels[best], logprob=likelihoods[best])
        return Completion(prompt_ids=(), tokens=(token,), text=labels[best], finish_reason="stop", mixture=mixture)

    return generate


def text_of(messages: Sequence[Message]) -> str:
    """Returns a prompt as the file of answers shows it: the content of its turns, each under its role if several."""
    if len(messages) == 1:
        return messages[0].text
    return "\n\n".join(f"{message.role}: {message.text}" for message in messages)


def parquet(answers: Sequence[Answered]) -> bytes:
    """Returns a Parquet file with a row per answer, and a column per field of `Answered`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [(name, pa.float64() if name == "reward" else pa.string()) for name in Answered.__slots__]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(answer) for answer in answers], pa.schema(fields)), buffer)
    return buffer.getvalue()
