"""`python -m benchmarks fifth`: a fifth domain after four on the tiny model, with the jobs of examples/fifth_domain.

Before and after the fifth domain: the files of the registry, what the four answer, what pass 1 names the requests of
all five kinds and of none, what is answered right, and what a few-shot search finds for a sibling of the fifth.
"""

from __future__ import annotations

import argparse
import asyncio
import runpy
import shutil
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch

from benchmarks.core.suite import machine
from benchmarks.fifth.figures import told
from t2ray.adapt.fewshot import fewshot
from t2ray.adapt.strategies import fixed
from t2ray.cli.output import check_json_folder, console, write_json
from t2ray.cluster.train.launch import train
from t2ray.config.search import CEMConfig
from t2ray.config.train import TrainConfig, load
from t2ray.core import Mixture, SamplingParams
from t2ray.evals.dispatched import Labelled, figures, name_all
from t2ray.evals.evaluate import evaluate
from t2ray.experts.registry import SHIPPED
from t2ray.prompts import OTHERS
from t2ray.tasks import builtin
from t2ray.tasks.build import build_task
from t2ray.tasks.task import Task
from t2ray.tasks.verifier import Verifier
from t2ray.workbench import Workbench, find_place, open_workbench

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fifth_domain"
HERE = ("workers=0", "verifiers=0", "experts=runs/four/experts")
SHIPPED_ONES = tuple(f"domains.{name}.train=false" for name in ("math", "code", "pick"))
FIFTH, SIBLING = "middle", "largest"
SHOTS, SEARCH = 20, CEMConfig(population=16, iterations=4)

Spoken = list[tuple[tuple[int, ...], tuple[float, ...]]]
"""The tokens of answers and their log-probabilities."""


def fifth(args: argparse.Namespace) -> None:
    """Measures with every seed, prints the tables, and writes the figures after each seed."""
    check_json_folder(args.json)
    place, seeds = Path.cwd(), list[dict[str, Any]]()
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            seeds.append({"seed": seed} | _of_seed(seed, args.prompts))
        found = {"machine": machine(torch.get_num_threads()), "prompts": args.prompts, "fifth": seeds}
        write_json(args.json and str(place / args.json), found)
    console.print("\n\n".join(told(seeds)), markup=False)


def _of_seed(seed: int, prompts: int) -> dict[str, Any]:
    """Trains the fourth domain beside three shipped ones, then the fifth, and measures before and after it."""
    shutil.copytree(EXAMPLE, ".", dirs_exist_ok=True)
    shutil.copytree(SHIPPED, "runs/four/experts")
    runpy.run_path("rows.py")
    four = load("four.yaml", [f"seed={seed}", *HERE, *SHIPPED_ONES])
    five = load("five.yaml", [f"seed={seed}", *HERE])
    train(four)
    before, files, said = _measured(five, four.labels, prompts)
    train(five)
    after, files_after, said_after = _measured(five, four.labels, prompts)
    kept = {
        "files": len(files), "changed": [name for name, data in files.items() if files_after.get(name) != data],
        "answers": len(said), "tokens": sum(len(ids) for ids, _ in said),
        "differing": sum(one != other for one, other in zip(said, said_after, strict=True)),
    }  # fmt: skip
    return {"before": before, "after": after, "kept": kept}


def _measured(
    config: TrainConfig, known: tuple[str, ...], prompts: int
) -> tuple[dict[str, Any], dict[str, bytes], Spoken]:
    """Returns figures of the registry as it is, its files, and what the `known` experts say to their test prompts."""
    bench = open_workbench(find_place(model=config.model, experts=config.experts))
    tasks = {name: build_task(config, name) for name in config.labels} | {OTHERS: builtin(OTHERS)}
    folder = Path(str(config.experts))
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = {
        "experts": [*bench.experts],
        "pass1": asyncio.run(_named(bench, tasks, prompts)),
        "right": {name: _right(bench, task, prompts) for name, task in tasks.items()},
        "search": _search(bench, _sibling(config)),
    }
    return found, files, asyncio.run(_said(bench, tasks, known, prompts))


async def _named(bench: Workbench, tasks: dict[str, Task], prompts: int) -> dict[str, Any]:
    asked = [
        Labelled(messages=example.messages, labels=(name,), group=name)
        for name, task in tasks.items()
        for example in task.examples("test", prompts)
    ]
    found = {}
    for name in ("prompt", "cls"):
        row = figures(asked, await name_all(bench.strategy(name), asked))
        found[name] = {"acc": row["acc"], "ece": row["ece"], "groups": row["groups"]}
    return found


def _right(bench: Workbench, task: Task, prompts: int) -> dict[str, float | None]:
    """Returns the shares of right answers by the base, by the domain's expert where there is one, and by pass 1."""
    names = ["base", *(name for name in (task.name,) if name in bench.experts), "cls"]
    with Verifier(task.reward, workers=0) as verify:
        examples, sampling = task.examples("test", prompts), bench.sampling(None, task)
        return {
            ("expert" if name == task.name else name): asyncio.run(
                evaluate(task.name, examples, bench.strategy(name), bench.engine.generate, verify, sampling)
            ).acc
            for name in names
        }


def _sibling(config: TrainConfig) -> Task:
    """Returns the task of the fifth domain's sibling, which is as the fifth but for its rows."""
    rows = {
        key: f"{SIBLING}_{split}.jsonl"
        for key, split in (("data", "train"), ("validation", "validation"), ("test", "test"))
    }
    domain = config.domains[FIFTH].model_copy(update=rows)
    return build_task(config.model_copy(update={"domains": {SIBLING: domain}}), SIBLING)


def _search(bench: Workbench, task: Task) -> dict[str, Any]:
    """Returns the mixture that a few-shot search finds for a task, and the share of its test prompts answered right."""
    engine, sampling = bench.engine, SamplingParams(max_tokens=task.max_tokens)
    with Verifier(task.reward, workers=0) as verify:

        async def searched() -> dict[str, Any]:
            found = await fewshot(
                engine.generate, engine.score, verify, task.examples("train", SHOTS), bench.experts,
                settings=SEARCH, sampling=sampling, gold=task.gold,
            )  # fmt: skip
            cell = await evaluate(
                task.name, task.examples("test"), fixed(found.mixture), engine.generate, verify, sampling
            )
            return {"mixture": str(found.mixture), "shots": found.accuracy, "acc": cell.acc, "n": cell.n}

        return asyncio.run(searched())


async def _said(bench: Workbench, tasks: dict[str, Task], known: tuple[str, ...], prompts: int) -> Spoken:
    asked = [
        bench.engine.generate(example.messages, Mixture.of({name: 1.0}), bench.sampling(None, tasks[name]))
        for name in known
        for example in tasks[name].examples("test", prompts)
    ]
    return [(answer.token_ids, answer.logprobs) for answer in await asyncio.gather(*asked)]
