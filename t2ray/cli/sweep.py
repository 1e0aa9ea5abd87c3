"""`t2ray sweep` tries settings of training or of the few-shot search, and runs the best again with new seeds.

Not here: the space (`config.search`) and its points (`sweep.space`), running trials (`cluster.train.tune`), and what a
trial does (`cluster.train.trials`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.text import Text

from t2ray.cli.options import Parser
from t2ray.cli.output import console
from t2ray.config.search import SweepConfig, job_at, load
from t2ray.config.train import TrainConfig

if TYPE_CHECKING:
    from t2ray.sweep.results import Trial

_PLAIN_EVERY_S = 10.0


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument("config", metavar="CONFIG.yaml", help="The file of the sweep.")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Keys that win over the file's, such as run=second trials=8 job.rl.steps=20; `t2ray config sweep` lists "
        "every key.",
    )
    p.add_argument("--resume", action="store_true", help="Go on with the sweep of that name.")


def run(args: argparse.Namespace) -> None:
    """Runs or resumes a sweep, shows it as it goes, and writes its table, its pictures and best.yaml."""
    config = load(args.config, args.overrides)
    config = config.model_copy(update={"out": _absolute(config.out)})

    from t2ray.cluster.session import check_shared, session
    from t2ray.cluster.train.trials import search_trial, train_trial
    from t2ray.cluster.train.tune import sweep
    from t2ray.runs.prepare import prepare
    from t2ray.sweep.pictures import draw
    from t2ray.sweep.results import BEST, write_results

    # Checked here, once, rather than by every trial: all matrices that the space asks for.
    jobs = [prepare(job, resume=True) for job in _choices_of_matrices(config)] if config.kind == "rl" else []
    with session() as have:
        check_shared([config.out, *(str(job.factors) for job in jobs)])
        if config.kind == "rl":
            config, holds, needs, steps = _training(config, jobs, have)
        else:
            paths = {key: _absolute(config.job[key]) for key in ("run", "factors", "experts") if config.job.get(key)}
            config = config.model_copy(update={"job": config.job | paths})
            holds = needs = {"CPU": config.cpus} | ({"GPU": config.gpus} if config.gpus else {})
            steps = 1
        trial = train_trial if config.kind == "rl" else search_trial
        with SweepDisplay() as display:
            trials = sweep(config, trial, steps=steps, holds=holds, needs=needs, resume=args.resume, tick=display.show)
    point = write_results(config, trials)
    pictures = draw(config, trials)
    folder = f"{config.out}/{config.run}"
    best = fmean(trial.score or 0.0 for trial in trials if trial.final and trial.point == point)
    console.print(
        f"best: {_settings(point)}, {best:.4f} over {config.seeds} further seeds, of {len(trials)} trials", markup=False
    )
    command = "t2ray train" if config.kind == "rl" else "t2ray adapt --config"
    console.print(f"{folder}/results.md (also .parquet, {', '.join(pictures)}); use it: {command} {folder}/{BEST}")


def _training(
    config: SweepConfig, jobs: Sequence[TrainConfig], have: dict[str, float]
) -> tuple[SweepConfig, dict[str, float], dict[str, float], int]:
    """Returns the sweep with what every trial would otherwise do again, and the resources and steps of a trial.

    With workers the trial's own process only waits for them; without, it trains.
    """
    from t2ray.adapters.factors import decompose
    from t2ray.cluster.session import slots
    from t2ray.cluster.train.trials import training_job
    from t2ray.sweep.results import Trial

    first = training_job(config, Trial(point={}, seed=0))
    assert first.cpus is not None
    worker = {"CPU": first.cpus} | ({"GPU": first.gpus} if first.gpus else {})
    domains = len(first.trains)
    workers = first.span[0]  # a range runs with its fewest
    needs = {key: amount * workers * domains for key, amount in worker.items()} if workers else worker
    one = {key: amount * max(1, workers) for key, amount in worker.items()}
    slots(one, have, f"a trial of sweep {config.run!r}")  # one domain must fit; more than that may wait for each other
    needs = {key: min(amount, have.get(key, 0.0)) for key, amount in needs.items()}
    factors = {str(job.factors): job for job in jobs if job.adapter.kind == "svf"}
    for folder, job in factors.items():
        decompose(job.model, folder, targets=job.trained.targets, layers=job.trained.layers)
    # Trials run in other folders than this process.
    named: dict[str, Any] = {"domains": _absolute_domains(config.job["domains"], jobs[0])}
    if len(factors) == 1:
        named["factors"] = str(jobs[0].factors)
    if "model" not in config.space:
        named["model"] = jobs[0].model
    config = config.model_copy(update={"job": config.job | named})
    steps = max(first.domain_rl(domain).steps for domain in first.trains)
    # a process that only waits: Tune takes no trial without any resource, and memory is what every node has
    holds: dict[str, float] = worker if workers == 0 else {"CPU": 0, "memory": 2**20}
    return config, holds, needs, steps


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _absolute_domains(given: dict[str, Any], ready: TrainConfig) -> dict[str, Any]:
    """Returns the domains as they were written, but with the whole paths of the files that they name."""
    files = ("data", "validation", "others")
    return {
        name: values | {key: getattr(ready.domains[name], key) for key in files if values.get(key)}
        for name, values in given.items()
    }


def _choices_of_matrices(config: SweepConfig) -> list[TrainConfig]:
    """Returns the training job with each choice of matrices that the space holds; one job, if it holds none."""
    keys = [key for key in ("targets", "layers", "adapter.targets", "adapter.layers") if key in config.space]
    jobs = [job_at(config, {key: value}) for key in keys for value in config.space[key].corners] or [job_at(config, {})]
    folder = {"out": f"{config.out}/{config.run}/trials", "run": "prepared"}
    return [job.model_copy(update=folder) for job in jobs if isinstance(job, TrainConfig)]


class SweepDisplay:
    """Draws a live line of how the sweep stands and how long it may take; elsewhere it prints one every ten seconds."""

    def __init__(self) -> None:
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.began = self.printed = time.monotonic()
        self.settled_before: int | None = None

    def __enter__(self) -> SweepDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, trials: Sequence[Trial], total: int) -> None:
        """Draws the trials as they stand."""
        line = self.line(trials, total)
        if self.live:
            self.live.update(Text(line), refresh=True)
        elif time.monotonic() - self.printed > _PLAIN_EVERY_S:
            self.printed = time.monotonic()
            console.print(line, markup=False)

    def line(self, trials: Sequence[Trial], total: int) -> str:
        """Returns `5 of 22 trials, 2 running, 1 stopped, 0 failed; best 0.812 (rl.lr=0.01); about 140 s left`."""
        ended = [trial for trial in trials if trial.status in ("done", "stopped", "failed")]
        if self.settled_before is None:
            self.settled_before = len(ended)
        count = {status: sum(trial.status == status for trial in trials) for status in ("running", "stopped", "failed")}
        scored = [trial for trial in trials if trial.status == "done" and trial.score is not None]
        best = max(scored, key=lambda trial: trial.score or 0.0, default=None)
        news = len(ended) - self.settled_before
        pace_s = (time.monotonic() - self.began) / max(1, news)
        left = f"about {pace_s * (total - len(ended)):.0f} s left" if news else "starting"
        shown = f"; best {best.score:.3f} ({_settings(best.point)})" if best else ""
        parts = ", ".join(f"{number} {status}" for status, number in count.items())
        return f"{len(ended)} of {total} trials, {parts}{shown}; {left}"


def _settings(point: dict[str, object]) -> str:
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in point.items())
