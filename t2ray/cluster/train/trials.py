"""One trial of a sweep: it trains a job (kind rl), or searches a mixture and scores it on unseen prompts (kind cem).

`tune` runs these functions in processes of their own; training goes through the same launcher as `t2ray train`.
"""

from __future__ import annotations

import asyncio
from functools import cache
from pathlib import Path
from statistics import fmean

from t2ray.adapt.fewshot import fewshot
from t2ray.adapt.strategies import fixed
from t2ray.cluster.train.launch import train
from t2ray.config.search import CEMJob, SweepConfig, job_at
from t2ray.config.train import TrainConfig
from t2ray.core import Example, RewardError
from t2ray.evals.evaluate import evaluate
from t2ray.sweep.results import ReportScore, Trial
from t2ray.tasks.build import task_named
from t2ray.tasks.verifier import Verifier
from t2ray.training.domain import domain_store
from t2ray.training.metrics import read_metrics
from t2ray.workbench import Workbench, find_place, open_workbench

TRIALS = "trials"
_LEFTOVER_S = 60.0  # a trial of a sweep that was killed may outlive it by some seconds
_VERIFIERS = 1


def train_trial(sweep: SweepConfig, trial: Trial, report: ReportScore) -> float:
    """Trains the job at the trial's point in a run folder of its own; returns the mean accuracy of its domains' best z.

    Each validation of all domains is reported, as the best so far, which is what the run would end with.
    """
    config = training_job(sweep, trial)
    last = max(config.domain_rl(domain).steps for domain in config.trains)
    told = 0

    def tick(config: TrainConfig) -> None:
        nonlocal told
        checked = [
            [row for row in read_metrics(domain_store(config, name)) if row.validation is not None and row.step < last]
            for name in config.trains
        ]
        while told < min(map(len, checked)):
            told += 1
            best = [max(row.validation or 0.0 for row in rows[:told]) for rows in checked]
            report(max(rows[told - 1].step for rows in checked), fmean(best))

    results = train(config, resume=True, tick=tick, wait_s=_LEFTOVER_S)
    return fmean(result.accuracy for result in results.values())


def training_job(sweep: SweepConfig, trial: Trial) -> TrainConfig:
    """Returns the training job of a trial: the sweep's at the trial's point, in the sweep's folder.

    A trial without one of its domains has no score, so that a domain that fails ends the trial at once.
    """
    job = job_at(sweep, trial.point)
    assert isinstance(job, TrainConfig), job
    folder = {"out": f"{sweep.out}/{sweep.run}/{TRIALS}", "run": trial.id, "experts": None, "seed": trial.seed}
    # a worker's share of the cluster would be another one whenever another number of trials runs beside it
    return job.model_copy(update={**folder, "cpus": job.cpus or 1.0, "fail_fast": True})


def search_trial(sweep: SweepConfig, trial: Trial, report: ReportScore) -> float:
    """Searches a mixture for each task from its shots; returns the mean accuracy on prompts that it has not seen."""
    job = job_at(sweep, trial.point)
    assert isinstance(job, CEMJob), job
    bench = _bench(job.run, job.model, job.factors, job.experts)
    return fmean(asyncio.run(_search(bench, job, name, trial.seed)) for name in job.tasks)


@cache  # Tune may use a process again, and the model is the same for every trial
def _bench(run: str | None, model: str | None, factors: str | None, experts: str | None) -> Workbench:
    return open_workbench(find_place(run, model, factors, experts))


async def _search(bench: Workbench, job: CEMJob, name: str, seed: int) -> float:
    task = task_named(name, bench.place.run)
    # Shots of further seeds are other prompts: a setting that is good for one draw of shots alone should not win.
    shots = shots_at(task.examples("train"), seed, job.shots)
    experts = tuple(word.strip() for word in job.only.split(",")) if job.only else bench.experts
    sampling = bench.sampling(job.max_tokens, task)
    layers = max(target.depth for target in bench.engine.layout) + 1 if job.per_layer else None
    path = (bench.place.run.code or None) if bench.place.run else str(Path.cwd())
    with Verifier(task.reward, workers=_VERIFIERS, path=path, success_above=task.success_above) as verify:
        found = await fewshot(
            bench.engine.generate, bench.engine.score, verify, shots, experts,
            settings=job.settings.model_copy(update={"seed": seed}), sampling=sampling, gold=task.gold,
            n_layers=layers,
        )  # fmt: skip
        held_out = task.examples("validation", job.held_out)
        cell = await evaluate(name, held_out, fixed(found.mixture), bench.engine.generate, verify, sampling)
    if cell.acc is None:
        raise RewardError(f"the verifier abstained from every answer to {name!r}, so that nothing tells settings apart")
    return cell.acc


def shots_at(examples: list[Example], seed: int, count: int) -> list[Example]:
    """Returns `count` examples, other ones for each of the first seeds as far as they go."""
    start = seed * count % max(1, len(examples) - count + 1)
    return examples[start : start + count]
