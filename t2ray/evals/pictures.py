"""The pictures of a grid of measurements, each where its figures are there. No torch.

Not here: how they are drawn (`plots`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from t2ray.config.tables import TablesConfig, job_of
from t2ray.core import Mixture
from t2ray.evals.cells import GridCell
from t2ray.evals.plots import alphas, by_itself, by_numbers, confusion, explained, learning

NAMING = ("prompt", "cls")
"""The strategies of which a picture shows what pass 1 takes tasks for."""


def pictures(config: TablesConfig, cells: Sequence[GridCell], found: Mapping[str, Any]) -> dict[str, str]:
    """Returns the SVG of each picture by the name of its file.

    Args:
        found: the figures of the cells (`tables.summary`).
    """
    drawn = {}
    for model, domain in dict.fromkeys((curve["model"], curve["domain"]) for curve in found["curves"]):
        mine = [curve for curve in found["curves"] if (curve["model"], curve["domain"]) == (model, domain)]
        name = f"{model}.{domain}" if len(config.models) > 1 else domain
        drawn[f"{name}.svg"] = learning(f"{model} {domain}", mine)
    kinds = {name: job_of(config, next(iter(config.models)), name, 0).adapter.kind for name in config.methods}
    for name, table in found["tables"].items():
        sizes = {row["training"]["numbers"] for row in table["rows"] if row["training"]}
        if len(sizes) > 2 and len(config.models) == 1 and table["tasks"][0] not in config.texts:
            drawn[f"{name}.numbers.svg"] = by_numbers(table, kinds)
    for model in config.models:
        if curves := {kind: curve for cell in cells if cell.model == model for kind, curve in cell.variance.items()}:
            drawn[f"{model}.variance.svg"] = explained(model, curves)
        for method in config.methods:
            its = [cell for cell in cells if (cell.model, cell.method) == (model, method)]
            for strategy in NAMING:
                if counts := named(its, strategy):
                    title = f"{model} {method} {strategy}"
                    drawn[f"{model}.{method}.{strategy}.svg"] = confusion(title, counts)
            weights = searched(its)
            if any(weights.values()):
                drawn[f"{model}.{method}.alpha.svg"] = alphas(
                    weights, f"{model} {method}: weights of few-shot searches"
                )
    return {name: by_itself(svg) for name, svg in drawn.items()}


def named(cells: Sequence[GridCell], strategy: str) -> dict[str, Counter[str]]:
    """Returns task -> how often pass 1 took a prompt of it for each label, over all seeds."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for cell in cells:
        for task, by_strategy in cell.measured.items():
            if labels := by_strategy.get(strategy, {}).get("labels"):
                counts[task].update(labels)
    return counts


def searched(cells: Sequence[GridCell]) -> dict[str, dict[str, list[float]]]:
    """Returns "task strategy" -> expert -> the weight that the few-shot search found, one for each seed."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for cell in cells:
        for task, by_strategy in cell.measured.items():
            for strategy, figures in by_strategy.items():
                if mixture := figures.get("mixture"):
                    weights = Mixture.parse(mixture).weights
                    found[f"{task} {strategy}"].append({name: alpha for name, (alpha,) in weights})
    return {
        row: {name: [one.get(name, 0.0) for one in seeds] for name in sorted({name for one in seeds for name in one})}
        for row, seeds in found.items()
    }
