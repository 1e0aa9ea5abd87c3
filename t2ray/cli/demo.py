"""`t2ray demo` runs the main job on the tiny models, from their weights to the reports; its stages stand in order.

Each trained task's expert is trained on Ray; the unseen siblings meet the experts only through dispatch and few-shot
search. Every accuracy is measured on the test split, which neither pretraining nor training has seen. A job has one
model: the tiny model's is run whole, and then the tiny vision model's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from t2ray.adapt.strategies import Strategy, classify, fixed
from t2ray.cli.options import Parser, at_least_one
from t2ray.cli.output import bar, console
from t2ray.config.files import read_yaml
from t2ray.config.search import CEMConfig
from t2ray.config.train import TrainConfig, resolve
from t2ray.core import Mixture, SamplingParams
from t2ray.prompts import OTHERS
from t2ray.tasks import builtin
from t2ray.tasks.build import build_task
from t2ray.tasks.task import Task
from t2ray.tasks.verifier import Verifier
from t2ray.tiny import MODEL

if TYPE_CHECKING:
    from t2ray.adapt.cem import Round
    from t2ray.adapters.factors import ShowProgress
    from t2ray.evals.evaluate import Cell
    from t2ray.experts.heatmap import HeatMap


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPart:
    """A job of the demo, the expert of each of its tasks, its own or its sibling's, and its classification domain.

    A few-shot search has `shots` labelled prompts, and `population` mixtures per round.
    """

    job: str
    own: Mapping[str, str]
    classifier: str | None = None
    shots: int = 40
    population: int = 32

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.own.values()))

    @property
    def labels(self) -> tuple[str, ...]:
        return (*self.trained, OTHERS)


PARTS = (
    DemoPart(
        job="demo.yaml",
        own={"math": "math", "code": "code", "pick": "pick", "math_long": "math", "code_long": "code",
             "pick_more": "pick"},
        classifier="dispatch",
    ),
    DemoPart(
        job="demo_vision.yaml",
        own={"shapes": "shapes", "counts": "counts", "places": "shapes"},
        shots=16,
        population=10,
    ),
)  # fmt: skip


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument(
        "--out",
        default="runs",
        metavar="DIR",
        help="The folder that receives demo and demo-vision, each with report.html, .md and .json.",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="The seed of all randomness.")
    p.add_argument("--limit", type=int, default=500, metavar="N", help="How many of each task's 500 test prompts.")


def run(args: argparse.Namespace) -> None:
    """Runs the stages of each part, prints its tables and writes its report."""
    at_least_one(args, "limit")
    from t2ray.evals.report import text_tables

    for part in PARTS:
        values = read_yaml(MODEL.with_name(part.job))
        config = resolve(values | {"out": args.out, "seed": args.seed}, where=part.job)
        folder = Path(config.out, config.run)
        if (folder / "report.json").exists():
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            end = f"finished before; to run it again, delete {folder} or choose another folder by --out"
        else:
            report = _run(part, config, args.limit)
            end = f"report: {folder}/report.html (also .md, .json)"
        console.print(text_tables(report), markup=False)
        console.print(f"\n{end}")


def _run(part: DemoPart, config: TrainConfig, limit: int) -> dict[str, Any]:
    """Runs the stages of a part, writes its report and returns it."""
    import torch

    from t2ray.adapters.factors import decompose
    from t2ray.cli.display import TrainingDisplay
    from t2ray.cluster.train.launch import train
    from t2ray.evals.evaluate import build_report
    from t2ray.evals.report import write_report
    from t2ray.runs.prepare import prepare
    from t2ray.training.domain import domain_store
    from t2ray.training.metrics import read_metrics

    timing: dict[str, float] = {}
    start = time.perf_counter()
    with _stage("decompose", timing), bar("decompose") as progress:
        config = prepare(config, resume=True)
        assert config.factors is not None
        decompose(config.model, config.factors, progress=progress)
    with _stage("train", timing), TrainingDisplay(config) as display:
        train(config, resume=True, tick=display.show)
    torch.set_num_threads(1)  # passes of this size gain little from a second, and lose much where a core is busy
    bench = Demo(part, config, limit)
    with _stage("adapt", timing):
        mixtures = asyncio.run(bench.adapt())
    with _stage("evaluate", timing):
        measured = asyncio.run(bench.evaluate(mixtures))
    timing["total"] = time.perf_counter() - start
    report = build_report(
        trained=part.trained, own=part.own, labels=part.labels, experts=part.trained, mixtures=mixtures,
        timing_s=timing, seed=config.seed,
        machine=f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}",
        **measured,
    )  # fmt: skip
    curves = {domain: [step.row() for step in read_metrics(domain_store(config, domain))] for domain in config.domains}
    write_report(Path(config.out, config.run), report, curves, bench.shifts())
    return report


@contextmanager
def _stage(name: str, timing: dict[str, float]) -> Iterator[None]:
    console.print(f"== {name}", style="bold")
    start = time.perf_counter()
    yield
    timing[name] = time.perf_counter() - start
    console.print(f"   {name}: {timing[name]:.1f} s")


class Demo:
    """The trained model of a part with its experts, and the part's tasks."""

    def __init__(self, part: DemoPart, config: TrainConfig, limit: int) -> None:
        from t2ray.workbench import Place, open_workbench

        self.part, self.config, self.limit = part, config, limit
        place = Place(model=config.model, factors=config.factors, experts=config.experts, run=config)
        self.engine, self.registry = open_workbench(place).engine, place.registry()
        self.tasks = {name: builtin(name) for name in part.own}

    async def adapt(self) -> dict[str, Mixture]:
        """Searches a mixture for every task on prompts of its training split, and saves it by the name of the task."""
        from t2ray.adapt.fewshot import fewshot

        part = self.part
        settings = CEMConfig(seed=self.config.seed, population=part.population, iterations=ROUNDS)
        found = {}
        for name, task in self.tasks.items():
            with _verifier(task) as verify, bar(f"few-shot {name}") as progress:

                def show(r: Round, progress: ShowProgress = progress) -> None:
                    progress(r.iteration, ROUNDS, f"accuracy {r.best.accuracy:.2f}")

                result = await fewshot(
                    self.engine.generate, self.engine.score, verify, task.examples("train", part.shots), part.trained,
                    settings=settings, sampling=SamplingParams(max_tokens=task.max_tokens), gold=task.gold,
                    progress=show,
                )  # fmt: skip
            found[name] = result.mixture
            self.registry.save_mixture(
                name, result.mixture, {"task": name, "shots": part.shots, "accuracy": result.accuracy}
            )
        return found

    async def evaluate(self, mixtures: Mapping[str, Mixture]) -> dict[str, Any]:
        """Measures every task under every method; returns the arguments of `build_report` that are measured."""
        from t2ray.evals.answers import Baseline
        from t2ray.evals.evaluate import dispatch_counts

        part, score = self.part, self.engine.score
        classifiers = {"prompt": classify(score, part.labels, Mixture.base())}
        if part.classifier:
            classifiers["cls"] = classify(score, part.labels, Mixture.of({part.classifier: 1.0}), name="cls")
        singles: dict[str, dict[str, Cell]] = {}
        adaptive: dict[str, dict[str, Cell]] = {}
        with bar("evaluate") as progress:
            for done, (name, task) in enumerate(self.tasks.items()):
                alone = {"base": Mixture.base()} | {expert: Mixture.of({expert: 1.0}) for expert in part.trained}
                strategies = {key: fixed(mixture) for key, mixture in alone.items()}
                adapting = classifiers | {"fewshot": fixed(mixtures[name], name="fewshot")}
                with _verifier(task) as verify:
                    cells = {key: await self._cell(task, s, verify) for key, s in (strategies | adapting).items()}
                singles[name] = {key: cells[key] for key in strategies}
                adaptive[name] = {key: cells[key] for key in adapting}
                progress(done + 1, len(self.tasks), name)
        others = builtin(OTHERS).examples("test", self.limit)
        return {
            "singles": singles,
            "adaptive": adaptive,
            "others": {name: await dispatch_counts(others, strategy) for name, strategy in classifiers.items()},
            "classifier": await self._classifier(part.classifier) if part.classifier else {},
            "pass1_share": await self._pass1_share(classifiers["cls"]) if part.classifier else None,
            "baselines": {
                name: Baseline.of(task.gold_readings(examples), task.options(examples))
                for name, task in self.tasks.items()
                for examples in [task.examples("test", self.limit)]
            },
        }

    async def _cell(self, task: Task, strategy: Strategy, verify: Verifier) -> Cell:
        from t2ray.evals.answers import Answers
        from t2ray.evals.evaluate import evaluate

        sampling = SamplingParams(max_tokens=task.max_tokens)
        return await evaluate(
            task.name, task.examples("test", self.limit), strategy, self.engine.generate, verify, sampling,
            answers=Answers(task.name, "", task.reading, task.gold, keep=False),
        )  # fmt: skip

    async def _classifier(self, name: str) -> dict[str, Cell]:
        """Measures the classification expert on the test split of its own task, where it writes the label."""
        task = build_task(self.config, name)
        with _verifier(task) as verify:
            return {
                "base": await self._cell(task, fixed(Mixture.base()), verify),
                "expert": await self._cell(task, fixed(Mixture.of({name: 1.0})), verify),
            }

    async def _pass1_share(self, strategy: Strategy) -> float:
        """Returns the time of pass 1 over that of pass 2 at 64 new tokens: the median of 5 batches of 16 requests."""
        prompts = [x.messages for task in self.tasks.values() for x in task.examples("test", 3)][:16]
        shares = []
        for _ in range(5):
            dispatches, pass1 = await _timed([strategy(messages) for messages in prompts])
            sampling = SamplingParams(max_tokens=64, ignore_eos=True)
            jobs = [self.engine.generate(m, d.mixture, sampling) for m, d in zip(prompts, dispatches, strict=True)]
            completions, pass2 = await _timed(jobs)
            assert all(len(c.token_ids) == 64 for c in completions)
            shares.append(pass1 / pass2)
        return median(shares)

    def shifts(self) -> dict[str, HeatMap]:
        """Returns the mean of z - 1 of each expert, per decoder layer and kind of matrix."""
        from t2ray.experts.heatmap import mean_shift

        engine, names = self.engine, self.config.domains
        return {name: mean_shift(engine.layout, engine.vector(Mixture.of({name: 1.0}))) for name in names}


ROUNDS = 6
"""The greatest number of rounds of a few-shot search, which ends by itself at about the fifth."""


def _verifier(task: Task) -> Verifier:
    return Verifier(task.reward, workers=1)


async def _timed(jobs: Sequence[Awaitable[Any]]) -> tuple[list[Any], float]:
    start = time.perf_counter()
    results = await asyncio.gather(*jobs)
    return results, time.perf_counter() - start
