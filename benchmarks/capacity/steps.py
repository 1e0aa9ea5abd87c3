"""The cost of a training step: the trainer's own `step` at many sizes, by one worker and by two, and their all-reduce.

The cost model counts multiply-adds, so that its prices are speeds: of a fold, of generation, of an update. Not here:
how prices are fitted (`fit`), and whole runs on a cluster (`runs`).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from benchmarks.capacity.fit import Fit, FitPoint, fitted
from benchmarks.core.shape import SPECIAL, BenchShape, make
from benchmarks.harness import Figures
from t2ray.adapters.factors import Factors, decompose
from t2ray.adapters.model import load_model
from t2ray.config.rl import RLConfig
from t2ray.core import SamplingParams, user
from t2ray.engine.offline import OfflineEngine
from t2ray.grades import Grade
from t2ray.store import Store
from t2ray.tasks.task import Task
from t2ray.training.trainer import Trainer

SHAPE = BenchShape(layers=4, width=256, inner=688, heads=4, vocabulary=2048)
LAYERS = ("0-3", "2-3", "3")
"""The layers that are adapted: all, or fewer for a smaller z."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """The size of a step: rollouts of all workers, tokens per prompt and per answer, adapted layers, workers."""

    rows: int
    prompt: int
    answer: int
    layers: str = LAYERS[0]
    workers: int = 1
    held: bool = False

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.prompt}+{self.answer}, layers {self.layers}, {self.workers} workers"


GRID = (
    *(StepWork(rows=rows, prompt=16, answer=answer) for rows in (8, 16, 32) for answer in (8, 32)),
    *(StepWork(rows=rows, prompt=48, answer=16) for rows in (8, 24)),
    *(StepWork(rows=rows, prompt=16, answer=24, layers=layers) for rows in (16, 32) for layers in LAYERS[1:]),
    StepWork(rows=24, prompt=16, answer=16, held=True),
    StepWork(rows=48, prompt=24, answer=32, held=True),
    StepWork(rows=12, prompt=40, answer=24, held=True),
    StepWork(rows=24, prompt=24, answer=16, layers="1-3", held=True),
    StepWork(rows=32, prompt=32, answer=12, layers=LAYERS[1], held=True),
)
"""Steps of one worker. Those that are held out are between the others and beyond them."""

TOGETHER = (
    StepWork(rows=32, prompt=16, answer=32, workers=2, held=True),
    StepWork(rows=32, prompt=48, answer=16, layers=LAYERS[1], workers=2, held=True),
)
"""Steps of two workers. All are held out: they must cost as much as half the rows and the all-reduce."""

SUMS = tuple(1 << power for power in range(17, 23))
SUMS_HELD = (3 << 16, 3 << 18, 3 << 20)
"""Numbers that two workers sum: the size of a large model's z times the shares of a batch. Fewer take as long."""

NEAR, FAR = 1 << 20, 8 << 20
"""Bytes that fit in a core's own cache, and in the cache that cores share."""


def terms(work: StepWork, shape: BenchShape, factors: Factors) -> dict[str, float]:
    """Returns what one worker does in a step, counted. `gmac` is 10^9 multiply-adds.

    `pass`: forward passes of decoding, each with a fixed cost. `generate_gmac`: all tokens through the layers, and
    those of answers through the vocabulary. `fold_gmac`: the fold before, if it pays. `update_gmac`: base and policy
    forward, and back to the lowest adapted layer. `z`: numbers that AdamW updates.
    """
    layer, head = sum(m * n for m, n in shape.matrices().values()), shape.vocabulary * shape.width
    adapted = sum(target.m * target.n for target in factors.layout)
    factored = sum(target.rank * (target.m + target.n) for target in factors.layout)
    fold = sum(target.m * target.n * target.rank for target in factors.layout)
    dense, lowest = layer * shape.layers, min(target.depth for target in factors.layout)
    rows = work.rows / work.workers
    tokens, answers = rows * (work.prompt + work.answer), rows * work.answer
    folds = tokens >= fold // (factored - adapted)  # `SVF.tokens_to_fold`
    plain = dense - adapted  # of the matrices that are not adapted
    back = layer * (shape.layers - lowest) - adapted + factored
    return {
        "step": 1.0,
        "pass": float(work.answer),
        "generate_gmac": (tokens * (dense if folds else plain + factored) + answers * head) / 1e9,
        "fold_gmac": folds * fold / 1e9,
        "update_gmac": (tokens * (dense + plain + factored + back) + 3 * answers * head) / 1e9,
        "z": float(factors.K),
    }


class StepBench:
    """Measures steps of one model, whose files and decompositions are in a folder."""

    def __init__(self, folder: Path, shape: BenchShape) -> None:
        self.folder, self.shape = folder, shape

    def write(self) -> None:
        """Writes the model; decompositions are made when they are needed."""
        make(self.shape, self.folder)

    def factors(self, layers: str) -> Factors:
        """Returns the decomposition of some layers."""
        return decompose(str(self.folder / "model"), self.folder / f"factors-{layers}", layers=layers)

    def seconds(self, works: Sequence[StepWork], rounds: int) -> list[float]:
        """Returns the least time of each step in interleaved rounds, on this rank: other load only adds to it."""
        torch.set_num_threads(1)
        times: list[list[float]] = [[] for _ in works]
        with tempfile.TemporaryDirectory() as store:
            trainers = {layers: self._trainer(layers, store) for layers in {work.layers for work in works}}
            for number in range(rounds + 1):
                for work, taken in zip(works, times, strict=True):
                    self._resize(trainers[work.layers], work)
                    taken.append(_timed(trainers[work.layers], number))
        return [min(taken[1:]) for taken in times]

    def _trainer(self, layers: str, store: str) -> Trainer:
        factors = self.factors(layers)
        model = load_model(str(self.folder / "model"), factors.folder, device="cpu")
        model.chat.eos_ids = (self.shape.vocabulary,)  # an id beyond the vocabulary: every answer has all its tokens
        rl = RLConfig(sigma=0.05, lr=1e-4, kl=0.1)
        engine = OfflineEngine(model)
        return Trainer(
            model, engine.generate, lambda name, z_K: engine.set_experts({name: z_K}),
            _task(1, 1), _halves, rl, Store(store), seed=0, digest="bench",
        )  # fmt: skip

    def _resize(self, trainer: Trainer, work: StepWork) -> None:
        trainer.task = _task(work.prompt, work.answer)
        trainer.train = trainer.task.examples("train")
        trainer.sampling = SamplingParams(max_tokens=work.answer, temperature=1.0)
        trainer.rl = trainer.rl.model_copy(update={"prompts": work.rows, "samples": 1})


def _timed(trainer: Trainer, number: int) -> float:
    start = time.perf_counter()
    asyncio.run(trainer.step(number + 1))
    return time.perf_counter() - start


async def _halves(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
    """A verifier for which every other rollout is right, so that each has an advantage."""
    return [Grade.of(float(i % 2)) for i in range(len(completions))]


def _task(prompt: int, answer: int) -> Task:
    words = " ".join(f"w{len(SPECIAL) + i}" for i in range(prompt))
    return Task(
        name="bench", rows=lambda split: [{}] * 64, messages=lambda row: user(words), reward="", gold=None,
        max_tokens=answer,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ several workers


def together(world: int, work: Any) -> Any:
    """Runs `work` in `world` processes of one thread in a process group of torch; returns the result of rank 0."""
    with tempfile.TemporaryDirectory() as name:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(world, mp_context=spawn) as processes:
            ranks = [processes.submit(_in_group, rank, world, f"{name}/group", work) for rank in range(world)]
            return [rank.result() for rank in ranks][0]


def _in_group(rank: int, world: int, file: str, work: Any) -> Any:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        return work()
    finally:
        distributed.destroy_process_group()


def summed(sizes: Sequence[int], rounds: int) -> list[float]:
    """Returns the seconds of an all-reduce of float32 numbers, for each size: the least of interleaved rounds."""
    numbers = [torch.ones(size) for size in sizes]
    rows = []
    for _ in range(rounds):
        row = []
        for each in numbers:
            distributed.barrier()
            start = time.perf_counter()
            distributed.all_reduce(each)
            row.append(time.perf_counter() - start)
        rows.append(row)
    return [min(column) for column in zip(*rows, strict=True)]


def sum_terms(world: int, numbers: float) -> dict[str, float]:
    """Returns the terms of a ring all-reduce of one worker.

    `message`: the messages it waits for, one after the other. `byte`: the bytes it sends. `far_byte`, `memory_byte`:
    those of them beyond a core's own cache, and beyond the shared one.
    """
    each = 2 * (world - 1) / world * 4 * numbers
    further = {"far_byte": max(each - NEAR, 0.0), "memory_byte": max(each - FAR, 0.0)}
    return {"message": 2.0 * (world - 1), "byte": each, **further}


# -------------------------------------------------------------------------------------------------------------- figures


def sums(rounds: int = 200) -> tuple[Figures, Fit]:
    """Returns the price of summing a z over two workers on one machine."""
    sizes = [*SUMS, *SUMS_HELD]
    fit = fitted(
        [
            FitPoint(name=f"{size} numbers", terms=sum_terms(2, size), seconds=seconds, held=size in SUMS_HELD)
            for size, seconds in zip(sizes, together(2, partial(summed, sizes, rounds)), strict=True)
        ]
    )
    return fit.figures(), fit


def steps(
    rounds: int = 5, shape: BenchShape = SHAPE, grid: Sequence[StepWork] = GRID, shared: Sequence[StepWork] = TOGETHER
) -> tuple[Figures, Fit]:
    """Returns the price of a training step of one worker; the times of two workers are predicted from it."""
    with tempfile.TemporaryDirectory() as name:
        bench = StepBench(Path(name), shape)
        bench.write()
        taken = [*zip(grid, bench.seconds(grid, rounds), strict=True)]
        if shared:
            taken += zip(shared, together(2, partial(bench.seconds, shared, rounds)), strict=True)
        points = [
            FitPoint(
                name=str(work), terms=terms(work, shape, bench.factors(work.layers)), seconds=seconds, held=work.held
            )
            for work, seconds in taken
        ]
    fit = fitted(points)
    return fit.figures(), fit
