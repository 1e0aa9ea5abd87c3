"""`python -m benchmarks experts`: 4 to 64 experts on the tiny model, in pass 1 and in the few-shot search.

The experts are the shipped ones and siblings of them: a sibling's change d of the model is that of a shipped expert
with noise n of the same size, `z - 1 = (d + n) / sqrt(2)`. Siblings have names that mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.core.suite import machine
from t2ray.adapt.fewshot import fewshot
from t2ray.adapt.strategies import classify, fixed
from t2ray.cli.output import check_json_folder, console, write_json
from t2ray.config.search import CEMConfig
from t2ray.core import Mixture, SamplingParams
from t2ray.evals.dispatched import Labelled, figures, name_all
from t2ray.evals.evaluate import evaluate
from t2ray.experts.registry import SHIPPED
from t2ray.grades import Verify
from t2ray.prompts import OTHERS
from t2ray.tasks import builtin
from t2ray.tasks.verifier import Verifier
from t2ray.workbench import Place, Workbench, open_workbench

COUNTS = (4, 16, 64)
SEARCH = CEMConfig(population=16, iterations=3)
UNSEEN, ANSWER = "pick_more", SamplingParams(max_tokens=12)


def experts(args: argparse.Namespace) -> None:
    """Measures every number of experts, prints a line for each, and writes the figures."""
    check_json_folder(args.json)
    rows = []
    with tempfile.TemporaryDirectory() as folder, Verifier(builtin(UNSEEN).reward, workers=0) as verify:
        bench = open_workbench(Place(model="tiny", factors=str(Path(folder)), experts=str(SHIPPED), run=None))
        for count in COUNTS:
            rows.append(asyncio.run(_of_count(bench, verify, count, args.prompts)))
            console.print(row_text(rows[-1]), markup=False)
    write_json(args.json, {"machine": machine(torch.get_num_threads()), "prompts": args.prompts, "experts": rows})


def row_text(row: dict[str, Any]) -> str:
    """Returns a line of a number of experts."""
    searches = ", ".join(
        f"{name} {100 * one['acc']:.1f} % with {one['answers']} answers" for name, one in row["searches"].items()
    )
    return f"{row['experts']} experts: pass 1 names {100 * row['acc']:.1f} % right, {row['ms']:.1f} ms; {searches}"


async def _of_count(bench: Workbench, verify: Verify, count: int, prompts: int) -> dict[str, Any]:
    names = siblings(bench, count)
    labels = (*names, OTHERS)
    asked = [
        Labelled(messages=example.messages, labels=(name,), group=name)
        for name in (*bench.experts, OTHERS)
        for example in builtin(name).examples("test", prompts)
    ]
    strategy = classify(bench.engine.score, labels, Mixture.base())
    await name_all(strategy, asked[:2])
    named = await name_all(strategy, asked)
    alone = [(await strategy(row.messages)).seconds for row in asked[:: max(1, len(asked) // 16)]]
    return {
        "experts": count, "acc": figures(asked, named)["acc"], "ms": 1000 * fmean(alone),
        "searches": {
            "all": await _search(bench, verify, names, prompts),
            "the best four": await _search(bench, verify, names, prompts, best=4),
        },
    }  # fmt: skip


async def _search(
    bench: Workbench, verify: Verify, names: Sequence[str], prompts: int, best: int | None = None
) -> dict[str, Any]:
    """The mixture that a search over all experts finds, or one over the `best` few by themselves on the shots."""
    task = builtin(UNSEEN)
    shots, answers, engine = task.examples("train", 10), 0, bench.engine
    if best is not None:
        alone = []
        for name in names:
            cell = await evaluate(task.name, shots, fixed(Mixture.of({name: 1.0})), engine.generate, verify, ANSWER)
            alone.append(cell.acc or 0.0)
        names = sorted(names, key=lambda name: -alone[names.index(name)])[:best]
        answers += len(alone) * len(shots)
    found = await fewshot(
        engine.generate, engine.score, verify, shots, names, settings=SEARCH, sampling=ANSWER, gold=task.gold
    )
    cell = await evaluate(
        task.name, task.examples("test", 3 * prompts), fixed(found.mixture), engine.generate, verify, ANSWER
    )
    return {"acc": cell.acc, "shots": found.accuracy, "answers": answers + found.history[-1].prompts,
            "mixture": str(found.mixture)}  # fmt: skip


def siblings(bench: Workbench, count: int) -> list[str]:
    """Gives the engine as many experts as `count`, and returns their names, the shipped ones' first."""
    shipped, generator = list(bench.experts), torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for i in range(count - len(shipped)):
        change_K = bench.engine.vector(Mixture.of({shipped[i % len(shipped)]: 1.0})).cpu() - 1
        noise_K = change_K.square().mean().sqrt() * torch.randn(len(change_K), generator=generator)
        made[f"sibling-{i + 1}"] = 1 + (change_K + noise_K) / 2**0.5
    bench.engine.set_experts(made)
    return [*shipped, *made]
