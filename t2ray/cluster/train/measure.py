"""What is measured of a cell of a grid: a task under a strategy, or a text that is read."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from statistics import fmean
from typing import Any

from t2ray.adapt.fewshot import FewShotResult, fewshot
from t2ray.adapt.strategies import Strategy, fixed
from t2ray.cluster.train.lent import lend
from t2ray.cluster.train.trials import shots_at
from t2ray.config.tables import BASE, EXPERT, FEWSHOT, SHUFFLED, TablesConfig, lender_of, search_of
from t2ray.config.train import TrainConfig
from t2ray.core import Mixture, SamplingParams
from t2ray.evals.answers import Answers, Baseline, lopsided, shares
from t2ray.evals.cells import GridCell
from t2ray.evals.evaluate import evaluate
from t2ray.grades import Verify
from t2ray.tasks import builtin
from t2ray.tasks.build import task_named
from t2ray.tasks.files import read
from t2ray.tasks.task import Task
from t2ray.tasks.verifier import Verifier
from t2ray.workbench import Workbench


async def measure(
    config: TablesConfig, job: TrainConfig, bench: Workbench, cell: GridCell, name: str, strategy: str
) -> dict[str, Any]:
    """Returns the figures of a task under a strategy.

    `correct` has a sign for each example: 1, 0, or - where the verifier abstained.
    """
    task, expert = _task(config, job, name)
    examples = task.examples("test", config.limit)
    sampling = bench.sampling(None, task)
    least = 1 if sampling.to_end else sampling.max_tokens
    more: dict[str, Any] = {}
    with Verifier(
        task.reward, workers=job.verifiers, path=job.code or None, unsafe_code=job.unsafe_code,
        success_above=task.success_above,
    ) as verify:  # fmt: skip
        if strategy.startswith(FEWSHOT):
            began = time.perf_counter()
            found = await _search(config, job, bench, cell, task, strategy, verify, sampling)
            answers_by: Strategy = fixed(found.mixture, name=strategy)
            more = {
                "mixture": str(found.mixture), "search_s": time.perf_counter() - began, "search_prompts": found.prompts,
            }  # fmt: skip
        elif lender_of(strategy):
            (lent,) = lend(config, bench, cell, strategy, [expert])
            answers_by = fixed(Mixture.of({lent: 1.0}), name=strategy)
            more = {SHUFFLED: "components"} if strategy.startswith(SHUFFLED) else {}
        else:
            answers_by = bench.strategy({BASE: "base", EXPERT: expert}.get(strategy, strategy))
        answers = Answers(name, strategy, task.reading, task.gold, keep=False)
        result = await evaluate(
            name, examples, answers_by, bench.engine.generate, verify, sampling,
            fits=lambda messages: bench.engine.fits(messages, least), batch_tokens=bench.batch_tokens, answers=answers,
        )  # fmt: skip
    baseline = Baseline.of(task.gold_readings(examples), task.options(examples))
    return more | {
        "correct": "".join("-" if right is None else "01"[right] for right in result.correct),
        "labels": dict(result.labels),
        "readings": shares(result.readings, baseline.golds), "warning": lopsided(result.readings, baseline.golds),
        "baselines": baseline.row(), "pass1_s": result.pass1_s, "pass2_s": result.pass2_s,
        "truncated": result.truncated, "too_long": result.too_long, "unseen": task.test_is_unseen,
    }  # fmt: skip


async def _search(
    config: TablesConfig, job: TrainConfig, bench: Workbench, cell: GridCell, task: Task, strategy: str, verify: Verify,
    sampling: SamplingParams,
) -> FewShotResult:  # fmt: skip
    """Returns what the few-shot search of a strategy finds, over the cell's experts, and another model's beside them.

    Raises:
        UnknownExpert: as `lend`.
        ConfigError: as `fewshot`.
    """
    count, settings = search_of(config, strategy)
    experts = list(bench.experts)
    if lender_of(strategy):
        experts += lend(config, bench, cell, strategy, job.labels)
    return await fewshot(
        bench.engine.generate, bench.engine.score, verify, shots_at(task.examples("train"), cell.seed, count), experts,
        settings=settings.model_copy(update={"seed": cell.seed}), sampling=sampling, gold=task.gold,
    )  # fmt: skip


async def read_text(
    config: TablesConfig, job: TrainConfig, bench: Workbench, cell: GridCell, name: str, strategy: str
) -> dict[str, Any]:
    """Returns the figures of a text under a strategy; `nats` has the mean loss of a token for each row of the text.

    Raises:
        DataError: the text has no such column.
    """
    text = config.texts[name]
    rows = read(text.data, "test").need({text.column: str}).rows[: config.limit]
    mixture = Mixture.of({text.expert: 1.0}) if strategy == EXPERT else Mixture.base()
    tokens = await asyncio.gather(*(bench.engine.read(row[text.column], mixture, 0) for row in rows))
    losses = [[-token.logprob for token in row[1:]] for row in tokens]  # nothing stands before the first
    return {"nats": [fmean(row) for row in losses if row], "warning": None}


def _task(config: TablesConfig, job: TrainConfig, name: str) -> tuple[Task, str]:
    """Returns a task with the expert that is its own, or its sibling's."""
    unseen = config.unseen.get(name)
    if unseen is None:
        return task_named(name, job), name
    return replace(builtin(unseen.task or name, unseen.data), name=name), unseen.expert
