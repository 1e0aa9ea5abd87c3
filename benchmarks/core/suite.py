"""Runs the benches of the core, by name, and those of serving."""

from __future__ import annotations

import asyncio
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import generation, sparse, training
from benchmarks.core.shape import BenchShape, Subject, make
from benchmarks.endpoint import many, serving
from benchmarks.endpoint.alone import Size, Unfolded, started
from benchmarks.harness import Figures
from t2ray.adapters.factors import decompose

BENCHES: dict[str, Callable[[Subject, int], Figures]] = {
    "rows": generation.rows,
    "sparse": sparse.sparse,
    "folded": generation.folded,
    "update": training.update,
    "rollout": generation.rollout,
    "cem": generation.cem,
    "dispatch": generation.dispatch,
}


def run(
    names: Sequence[str],
    *,
    shape: BenchShape,
    repeats: int,
    threads: int,
    progress: Callable[[str, Figures], None] = lambda name, figures: None,
) -> dict[str, Figures]:
    """Runs benches on one model in a temporary folder; returns their figures, which `progress` gets bench by bench."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            subject = make(shape, Path(folder))
            results = {}
            for name in names:
                results[name] = BENCHES[name](subject, repeats)
                progress(name, results[name])
            return results
    finally:
        torch.set_num_threads(before)


def serve_model(model: str, experts: Path) -> dict[str, Figures]:
    """Returns what an endpoint of another model keeps of its engine's speed, with one thread.

    Raises:
        ConfigError: there are fewer than two experts.
        ResourceError: the endpoint does not start, or a request failed.
    """
    torch.set_num_threads(1)
    mixtures = serving.mixtures_of(experts)
    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as runner:
        folder = Path(name)
        decompose(model, folder / "factors")
        with serving.paired(
            folder, folder / "factors", runner, serving.OF_A_MODEL, model=model, experts=experts, mixtures=mixtures
        ) as pair:
            return {"throughput": serving.throughput(pair)}


def as_json(results: Mapping[str, Figures], threads: int) -> dict[str, Any]:
    """Returns what `--json` writes: the figures per bench, the machine, and the date."""
    figures = {name: {key: value.as_json() for key, value in rows.items()} for name, rows in results.items()}
    return {**figures, "machine": machine(threads), "date": date.today().isoformat()}


def machine(threads: int) -> dict[str, str | int]:
    """Returns the processor, the number of threads that were used, and the versions of Python and torch."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.machine(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def serve(
    *, size: Size | None = None, progress: Callable[[str, Figures], None] = lambda name, figures: None
) -> dict[str, Figures]:
    """Returns the figures of serving the tiny model, with one thread.

    Raises:
        ResourceError: the endpoint does not start, or a request failed.
    """
    size, results = size or Size(), {}
    torch.set_num_threads(1)  # as the replica has by `serve_config.yaml`
    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as runner:
        folder = Path(name)
        factors, shelf = folder / "factors", folder / "shelf"
        decompose("tiny", factors)

        def note(name: str, figures: Figures) -> None:
            results[name] = figures
            progress(name, figures)

        with started(factors) as folding, started(factors, Unfolded) as unfolded:
            engines = many.Engines(folding=folding, unfolded=unfolded, runner=runner, size=size)
            note("experts", many.spread(engines))
            note("fold", many.fold(engines))
        note("memory", many.memory(factors, folder, size))
        many.write_experts(shelf, factors, size.experts)
        with serving.paired(folder, factors, runner, size) as pair:
            note("added", serving.added(pair))
            note("throughput", serving.throughput(pair))
            note("first_token", serving.first_token(pair))
            note("registered", serving.registered(pair, shelf))
    return results
