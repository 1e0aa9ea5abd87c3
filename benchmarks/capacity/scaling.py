"""The parts of `python -m benchmarks scaling`: gain of cores and workers, time to start, cost models.

Each part is measured on this machine, with the tiny model or one of random weights; docs/scaling.md extrapolates to
other machines. Not here: the measurements themselves (`runs`, `steps`, `engines`, `queues`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.capacity import engines, fleet, queues, runs, steps
from benchmarks.core.suite import as_json
from benchmarks.harness import Figures
from t2ray.adapters.factors import decompose
from t2ray.runs.memory import shape_of

Part = tuple[Figures, Mapping[str, Any]]
"""The figures of a part, and its fitted models with their points."""


def _training(folder: Path) -> Part:
    figures, fit = steps.steps()
    sums, ring = steps.sums()
    return figures | {f"sum_{name}": figure for name, figure in sums.items()}, {
        "step": fit.as_json(),
        "sum": ring.as_json(),
    }


def _serving(folder: Path) -> Part:
    decompose("tiny", folder / "factors")
    figures, step, score = engines.engine(folder / "factors")
    figures |= {f"two_engines_{name}": figure for name, figure in engines.beside(folder / "factors").items()}
    return figures, {"engine_step": step.as_json(), "score": score.as_json()}


def _endpoint(folder: Path) -> Part:
    decompose("tiny", folder / "factors")
    _, step, score = engines.engine(folder / "factors", rounds=2)
    return queues.endpoint(folder, step, score)


PARTS: dict[str, Callable[[Path], Part]] = {
    "domains": lambda folder: (runs.domains(folder), {}),
    "decomposition": lambda folder: (runs.decomposition(folder), {}),
    "startup": lambda folder: (runs.startup(folder), {}),
    "training": _training,
    "serving": _serving,
    "endpoint": _endpoint,
}


def run(
    names: Sequence[str],
    model: str | None = None,
    progress: Callable[[str, Figures], None] = lambda name, figures: None,
) -> dict[str, Any]:
    """Returns the report of the named parts, and of a fleet that serves `model`; `progress` gets each part's figures.

    Raises:
        ModelError: there is no such model.
    """
    results: dict[str, Figures] = {}
    models: dict[str, Any] = {}
    if model is not None:
        results["fleet"] = fleet.figures(shape_of(model))
        progress("fleet", results["fleet"])
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            results[name], found = PARTS[name](Path(folder))
        models |= {f"{name}_{key}": value for key, value in found.items()}
        progress(name, results[name])
    return as_json(results, threads=1) | {"models": models}
