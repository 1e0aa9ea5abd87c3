"""A thousand experts in one engine, without HTTP: speed, memory, and the gain and cost of folding.

Not here: an endpoint with these experts (`serving`).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save, save_file

from benchmarks.endpoint.alone import Size, burst, sums
from benchmarks.endpoint.processes import pss
from benchmarks.harness import Figures, interleaved, measure, ratio
from t2ray.adapters.factors import Factors
from t2ray.adapters.model import load_model
from t2ray.core import Mixture
from t2ray.engine.online import OnlineEngine
from t2ray.experts.follow import Follower
from t2ray.experts.manifest import ExpertManifest
from t2ray.experts.registry import MANIFEST, TENSORS, Registry

SHORT = 8
"""Tokens per answer of an alternating load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Two engines of the same model and experts: a normal one, and one that never folds."""

    folding: OnlineEngine
    unfolded: OnlineEngine
    runner: asyncio.Runner
    size: Size

    def fill(self) -> list[Mixture]:
        """Gives both the same random experts, z = 1 + 0.1 N(0, 1); returns one mixture per expert."""
        draw = torch.Generator().manual_seed(0)
        K = self.folding.model.adapter.size
        experts = {f"e{i:04}": 1 + 0.1 * torch.randn(K, generator=draw) for i in range(self.size.experts)}
        for engine in (self.folding, self.unfolded):
            engine.set_experts(experts)
        return [Mixture.parse(name) for name in experts]

    def work(
        self, engine: OnlineEngine, mixtures: list[Mixture], rows: int, each: int, tokens: int | None = None
    ) -> Callable[[], None]:
        """Returns a side to time: `rows` workers ask `each` times, for `mixtures` in turn, also from round to round."""
        turns, prompts = itertools.cycle(mixtures), sums()

        def go() -> None:
            self.runner.run(burst(engine, turns, prompts, rows=rows, each=each, tokens=tokens or self.size.tokens))

        return go


def spread(engines: Engines) -> Figures:
    """Returns the speed of requests for all experts in random order, over that of requests for one unfolded expert."""
    size, figures = engines.size, Figures()
    experts = engines.fill()
    random.Random(0).shuffle(experts)
    for rows, each in ((size.rows, size.each), (4 * size.rows, 1)):
        times = interleaved(
            {
                "one": engines.work(engines.unfolded, experts[:1], rows, each),
                "many": engines.work(engines.folding, experts, rows, each),
                "folded": engines.work(engines.folding, experts[:1], rows, each),
            },
            size.rounds,
        )
        figures[f"over_one_{rows}_rows"] = measure(ratio(times, "one", "many"), 0.95)
        figures[f"over_one_folded_{rows}_rows"] = measure(ratio(times, "folded", "many"))
        answered = rows * each * size.tokens
        figures[f"tokens_per_s_{rows}_rows"] = measure([answered / seconds for seconds in times["many"]])
    return figures


def fold(engines: Engines) -> Figures:
    """Returns the tokens per second of an engine that may fold, over those of one that may not.

    `one_...`: all requests have one mixture. `alternating`: two mixtures in turn, with answers too short for a fold to
    pay. `worst`: two mixtures in turn, each for just so long that the engine folds, and no longer.
    """
    size, figures = engines.size, Figures()
    one, other = engines.fill()[:2]
    svf = engines.folding.model.adapter
    enough = svf.tokens_to_fold() + SHORT
    loads = {
        "one_1_row": ([one], 1, size.each, size.tokens),
        f"one_{size.rows}_rows": ([one], size.rows, size.each, size.tokens),
        "alternating": ([one, other], 1, 4 * size.each, SHORT),
        "worst": ([one, other], 1, size.each, enough),
    }
    for name, load in loads.items():
        before, requests = engines.folding.stats.folds, (size.rounds + 1) * load[1] * load[2]
        sides = {"folding": engines.work(engines.folding, *load), "never": engines.work(engines.unfolded, *load)}
        figures[name] = measure(ratio(interleaved(sides, size.rounds), "never", "folding"))
        figures[f"{name}_folds_a_request"] = measure([(engines.folding.stats.folds - before) / requests])
    return figures


def memory(factors: Path, folder: Path, size: Size) -> Figures:
    """Returns the memory that experts add to the process of a replica, for rising numbers; in MB of 2^20 bytes."""
    shelf, registry = folder / "memory-shelf", folder / "memory-experts"
    write_experts(shelf, factors, size.experts)
    registry.mkdir()
    steps = [size.experts // 4, size.experts // 2, size.experts]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        held = process.submit(_bytes_by_step, factors, shelf, registry, steps).result()
    first, *rest = held
    added = [(bytes_ - first) / 2**20 for bytes_ in rest]
    of_z = 4 * Factors.open(factors).K * size.experts / 2**20
    counts = [steps[0], steps[1] - steps[0], steps[2] - steps[1]]
    slopes = [1024 * (b - a) / n for (a, b), n in zip(itertools.pairwise([0.0, *added]), counts, strict=True)]
    return {
        **{f"experts_{count}_mb": measure([mb]) for count, mb in zip(steps, added, strict=True)},
        f"z_of_{size.experts}_mb": measure([of_z]),
        "over_z": measure([added[-1] / of_z]),
        "kb_an_expert": measure(slopes),
    }


def write_experts(folder: Path, factors: Path, count: int) -> None:
    """Writes so many random experts in a registry's format, a thousand per second: without waiting for the disk."""
    opened, draw = Factors.open(factors), torch.Generator().manual_seed(1)
    for i in range(count):
        place = folder / f"e{i:04}" / "v0001"
        place.mkdir(parents=True)
        z = {target.name: 1 + 0.1 * torch.randn(target.rank, generator=draw) for target in opened.layout}
        save_file(z, place / TENSORS, {"format": "pt"})
        manifest = ExpertManifest(
            name=place.parent.name, version=1, base_digest=opened.base_digest, domain=place.parent.name,
            targets=tuple((target.name, target.rank) for target in opened.layout), metrics={"accuracy": 0.5},
        )  # fmt: skip
        (place / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")


def expert_file(factors: Path) -> bytes:
    """Returns the content of a file with a random expert, for an upload."""
    layout = Factors.open(factors).layout
    file: bytes = save({target.name: 1 + 0.1 * torch.randn(target.rank) for target in layout})
    return file


def _bytes_by_step(factors: Path, shelf: Path, registry: Path, steps: list[int]) -> list[int]:
    """Returns this process' bytes without experts, and after each step. It follows the registry as a replica does."""
    model = load_model("tiny", factors, device="cpu")
    follower = Follower(Registry(registry), model.base_digest, model.adapter.layout, model.adapter.join)
    engine = OnlineEngine(model)
    names, held = sorted(path.name for path in shelf.iterdir()), []
    for count in [0, *steps]:
        for name in names[len(follower.snapshot.tensors) : count]:
            (shelf / name).rename(registry / name)
        follower.sync()
        engine.set_experts(dict(follower.snapshot.tensors))
        assert len(follower.snapshot.tensors) == count, follower.snapshot.problems
        gc.collect()
        held.append(pss())
    return held
