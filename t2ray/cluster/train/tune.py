"""Runs the trials of a sweep on Ray Tune; ASHA ends those that fall behind.

What a trial does is a function that it is given (`trials`); the sweep's whole state is `trials.json`
(`sweep.results`), not Tune's: after a kill, settled trials are replayed to the scheduler from it and the others go on
from their own checkpoints.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from ray import tune
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

from t2ray.cluster.session import session, slots
from t2ray.config.search import Dimension, SweepConfig
from t2ray.core import ConfigError, T2RayError
from t2ray.runs.lease import lease
from t2ray.store import Store
from t2ray.sweep.results import ReportScore, Trial, finalists, open_sweep, save, start
from t2ray.sweep.space import own_point, points

Run = Callable[[SweepConfig, Trial, ReportScore], float]
TrialsTick = Callable[[Sequence[Trial], int], None]

_RESTARTS = 2  # of a trial whose node or process died; a mistake of the user's is not tried again
_TUNE = "tune"


def sweep(
    config: SweepConfig,
    run: Run,
    *,
    steps: int,
    holds: Mapping[str, float],
    needs: Mapping[str, float],
    resume: bool = False,
    tick: TrialsTick = lambda trials, total: None,
) -> list[Trial]:
    """Runs the search, then the finalists on further seeds; returns every trial as it ended.

    Args:
        run: what a trial does; reports (step, score) as it goes and returns the final score.
        steps: the last step that a trial can report, for the early stopping.
        holds: the resources of the trial's own process.
        needs: those that it takes all in all, its workers' too.
        tick: called with all trials and their final number whenever one reports.

    Raises:
        ResourceError: one trial needs more than the cluster has.
        RunError: the sweep exists and is not resumed; or no trial, or no finalist, ran to its end.
    """
    if config.sampler == "optuna" and importlib.util.find_spec("optuna") is None:
        raise ConfigError("sampler optuna needs the extra: pip install 't2ray[optuna]'; or use random, grid or quasi")
    open_sweep(config, resume=resume)
    tried = points(config) if config.sampler != "optuna" else []
    count = len(tried) or config.trials
    with ExitStack() as stack, session() as have:
        at_once = min(slots(needs, have, f"a trial of sweep {config.run!r}"), config.at_once or count)
        stack.enter_context(lease(f"{config.out}/{config.run}"))
        known = open_sweep(config, resume=resume)  # as the driver before left it
        start(config)
        state = _State(config, known, count + min(config.finalists, count) * config.seeds, tick)
        go = partial(state.run, run, steps=steps, holds=holds, at_once=at_once)
        base = int(config.job.get("seed", 0))
        search = [Trial(point=point, seed=base) for point in tried]
        go(search, scheduler=_halving(steps) if config.stop_early else FIFOScheduler())
        best = finalists(list(state.trials.values()), config.finalists)
        further = range(base + 1, base + 1 + config.seeds)
        final = [Trial(point=point, seed=seed, final=True) for point in best for seed in further]
        go(final, scheduler=FIFOScheduler())
    folder = Store(f"{config.out}/{config.run}")
    if folder.exists(_TUNE):
        folder.delete(_TUNE)
    return list(state.trials.values())


def _halving(steps: int) -> Any:
    """Returns ASHA with a third of the run as its grace, after which the best third of the trials so far goes on."""
    grace = max(1, round(steps / 3))
    return AsyncHyperBandScheduler(time_attr="step", max_t=max(steps, 1), grace_period=grace, reduction_factor=3)


class _State(tune.Callback):
    """The trials by id; each is written down when Tune tells of it."""

    def __init__(self, config: SweepConfig, known: Mapping[str, Trial], total: int, tick: TrialsTick) -> None:
        self.config, self.trials, self.total, self.tick = config, dict(known), total, tick
        self.seed, self.final = 0, False
        self.began: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks down; this one's state has a file of its own

    def run(
        self, run: Run, trials: Sequence[Trial], *, steps: int, holds: Mapping[str, float], at_once: int, scheduler: Any
    ) -> None:
        """Runs trials to their end; without any, those that Optuna proposes."""
        if trials:
            for trial in trials:
                self.trials.setdefault(trial.id, trial)
            if all(self.trials[trial.id].settled for trial in trials):
                return
            given = [[json.dumps(trial.point), trial.seed, trial.final] for trial in trials]
            space: dict[str, Any] = {"trial": tune.grid_search(given)}
            searcher, samples = BasicVariantGenerator(max_concurrent=at_once), 1
        else:
            searcher, space, samples = self._optuna(at_once), {}, self.config.trials
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial is told by its error in the table
        trainable = tune.with_parameters(_trainable, run=run, config=self.config, steps=steps, known=self.trials)
        folder = f"{self.config.out}/{self.config.run}"
        Tuner(
            tune.with_resources(trainable, dict(holds)),
            param_space=space,
            tune_config=TuneConfig(
                metric="score", mode="max", scheduler=scheduler, search_alg=searcher, num_samples=samples,
                trial_dirname_creator=lambda trial: trial.trial_id,
                reuse_actors=True,  # importing torch again for each trial would be half of a small sweep
            ),
            run_config=RunConfig(
                name=f"{_TUNE}-{time.time_ns():x}", storage_path=f"{folder}/{_TUNE}", verbose=0, callbacks=[self],
                failure_config=FailureConfig(max_failures=_RESTARTS),
            ),
        ).fit()  # fmt: skip
        save(self.config, self.trials)

    def _optuna(self, at_once: int) -> Any:
        """Returns Optuna's sampler of the same dimensions; it is first told what was tried and the job's own point."""
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        tried = [trial.point for trial in self.trials.values() if not trial.final] or [own_point(self.config)]
        spaces = self.config.space
        # Optuna is told of the points that its distributions can hold: the job's own may lie outside the space.
        inside = [p for p in tried if all(_inside(spaces[key], value) for key, value in p.items())]
        return ConcurrencyLimiter(
            OptunaSearch(
                {key: _distribution(dimension) for key, dimension in spaces.items()},
                metric="score", mode="max", seed=self.config.seed,
                points_to_evaluate=[{key: _encoded(spaces[key], value) for key, value in p.items()} for p in inside],
            ),
            max_concurrent=at_once,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------- Tune's callbacks

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Notes that a trial begins, or begins again after its process died."""
        mine = _of(self.config, trial.config)
        now = self.trials.setdefault(mine.id, mine)
        self.began[mine.id] = time.monotonic() - now.seconds
        if not now.settled:
            self._note(replace(now, status="running", history=()))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Notes what a trial reports."""
        now = self.trials[_of(self.config, trial.config).id]
        if now.settled:
            return
        now = replace(now, seconds=time.monotonic() - self.began[now.id])
        if result.get("failed"):
            self._note(replace(now, status="failed", error=result["failed"]))
            return
        step, score = int(result["step"]), float(result["score"])
        now = replace(now, step=step, score=score, history=(*now.history, (step, score)))
        self._note(replace(now, status="done") if result.get("complete") else now)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Notes that a trial ended, by itself or because it fell behind."""
        now = self.trials[_of(self.config, trial.config).id]
        if now.status == "running":
            self._note(replace(now, status="stopped"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Notes that the process of a trial died once too often."""
        now = self.trials[_of(self.config, trial.config).id]
        lines = [line.strip() for line in str(trial.get_error() or "").splitlines() if line.strip()]
        last = lines[-1] if lines else "its process died; was the machine out of memory?"
        self._note(replace(now, status="failed", error=f"failed {_RESTARTS + 1} times, last with: {last}"))

    def _note(self, trial: Trial) -> None:
        self.trials[trial.id] = trial
        save(self.config, self.trials)
        self.tick(list(self.trials.values()), self.total)


def _trainable(given: dict[str, Any], *, run: Run, config: SweepConfig, steps: int, known: Mapping[str, Trial]) -> None:
    """Runs a trial in its process. One that is settled is only told again: the scheduler compares others with it."""
    trial = _of(config, given)
    before = known.get(trial.id)

    def report(step: int, score: float) -> None:
        tune.report({"step": step, "score": score})

    if before is not None and before.settled:
        *earlier, (step, score) = before.history
        for at, value in earlier:
            report(at, value)
        tune.report({"step": step, "score": score, "complete": before.status == "done"})
        return
    try:
        score = run(config, trial, report)
    except T2RayError as error:  # told, not raised: trying again would not help
        tune.report({"step": 0, "score": -1.0, "failed": " ".join(str(error).split())})
        return
    tune.report({"step": steps, "score": score, "complete": True})


def _of(config: SweepConfig, given: Mapping[str, Any]) -> Trial:
    """Returns the trial that a configuration of Tune stands for."""
    if "trial" in given:
        point, seed, final = given["trial"]
        return Trial(point=json.loads(point), seed=seed, final=final)
    point = {key: _decoded(config.space[key], given[key]) for key in config.space}
    return Trial(point=point, seed=int(config.job.get("seed", 0)))


# -------------------------------------------------------------------------------------------------------------- optuna


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.values is not None:
        return CategoricalDistribution([json.dumps(value) for value in dimension.values])
    low, high = dimension.bounds
    if dimension.integers:
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=dimension.log is not None)


def _inside(dimension: Dimension, value: Any) -> bool:
    if dimension.values is not None:
        return value in dimension.values
    return value is not None and dimension.bounds[0] <= value <= dimension.bounds[1]


def _encoded(dimension: Dimension, value: Any) -> Any:
    return json.dumps(value) if dimension.values is not None else value


def _decoded(dimension: Dimension, value: Any) -> Any:
    if dimension.values is not None:
        return json.loads(value)
    return value if dimension.integers else float(f"{value:.4g}")
