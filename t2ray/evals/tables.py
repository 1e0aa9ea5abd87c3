"""The tables and curves of a grid of measurements: what its cells say, with intervals and paired tests. No torch.

`summary` has every figure and is written as `tables.json`. Not here: how cells are made (`cluster.train.cells`), and
what the tables look like (`tabled`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from t2ray.config.tables import EXPERT, TableConfig, TablesConfig
from t2ray.evals.cells import GridCell
from t2ray.evals.intervals import over_seeds, paired, spread

Summary = dict[str, Any]
"""What `tables.json` holds; every value is plain."""

SHAPES = ("numbers", "seconds", "peak_gib", "kl")
"""What a training is told by beside its accuracy."""

SEARCH = ("search_prompts", "search_s")
"""What a few-shot search spent: the answers that it generated, and its seconds."""


def summary(config: TablesConfig, cells: Sequence[GridCell]) -> Summary:
    """Returns every figure of the tables, the learning curves, and what is missing with its reason.

    A table has rows of model, method and strategy; a cell of a row has the mean accuracy of the seeds that are there,
    its interval, n and the seeds, and where the table compares with a row, the difference to it.
    """
    return {
        "run": config.run,
        "models": {name: _weights(name, cells) for name in config.models},
        "methods": config.methods,
        "seeds": list(config.seeds),
        "machines": sorted({f"{cell.machine}; {cell.date}" for cell in cells if cell.machine}),
        "seconds": sum(cell.seconds for cell in cells),
        "tables": {name: _table(config, table, cells) for name, table in config.tables.items()},
        "curves": _curves(config, cells),
        "dispatched": _of_strategies(cells, "labels"),
        "mixtures": _of_strategies(cells, "mixture"),
        "warnings": _warnings(cells),
        "missing": _missing(config, cells),
    }


def _weights(model: str, cells: Sequence[GridCell]) -> str | None:
    return next((cell.base_digest for cell in cells if cell.model == model and cell.base_digest), None)


def _table(config: TablesConfig, table: TableConfig, cells: Sequence[GridCell]) -> Summary:
    rows = []
    for model in config.models:
        mine = [cell for cell in cells if cell.model == model]
        reference, _, its_strategy = (table.against or "").partition("/")
        for method, strategy in table.rows(model):
            row: Summary = {"model": model, "method": method, "strategy": strategy, "tasks": {}}
            for task in table.tasks:
                values = _values(mine, method, strategy, task)
                (found,) = _in_all(values)
                if not found or not found[0]:
                    continue
                row["tasks"][task] = _mean(found, text=task in config.texts)
                other = _values(mine, reference, its_strategy, task)
                if other and (method, strategy) != (reference, its_strategy):
                    ours, theirs = _in_all(values, other)
                    most = math.inf if task in config.texts else 1.0
                    alike = method == reference and values.keys() == other.keys()
                    row["tasks"][task]["difference"] = asdict(paired(ours, theirs, most, alike=alike))
            row["training"] = _training(mine, method, table.tasks) if strategy == EXPERT else None
            row["pass1"] = _pass1(mine, method, strategy, table.tasks)
            row["search"] = _search(mine, method, strategy, table.tasks)
            rows.append(row)
    return {
        "title": table.title, "tasks": list(table.tasks), "against": table.against, "rows": rows,
        "baselines": _baselines(cells, table.tasks),
    }  # fmt: skip


def _pass1(cells: Sequence[GridCell], method: str, strategy: str, tasks: Sequence[str]) -> dict[str, float]:
    """Returns task -> the time of pass 1 as a share of that of pass 2, over all seeds, where pass 1 chose labels."""
    shares: dict[str, float] = {}
    for task in tasks:
        found = [cell.measured.get(task, {}).get(strategy) for cell in cells if cell.method == method]
        chosen = [figures for figures in found if figures and figures.get("labels")]
        if chosen:
            shares[task] = sum(one["pass1_s"] for one in chosen) / sum(one["pass2_s"] for one in chosen)
    return shares


def _search(cells: Sequence[GridCell], method: str, strategy: str, tasks: Sequence[str]) -> Summary:
    """Returns task -> the answers that the few-shot search generated, and its seconds, as means over seeds."""
    spent: Summary = {}
    for task in tasks:
        found = [cell.measured.get(task, {}).get(strategy, {}) for cell in cells if cell.method == method]
        if counted := [[one[key] for key in SEARCH] for one in found if "search_prompts" in one]:
            prompts, seconds = zip(*counted, strict=True)
            spent[task] = {"prompts": fmean(prompts), "seconds": fmean(seconds)}
    return spent


def _values(cells: Sequence[GridCell], method: str, strategy: str, task: str) -> dict[int, Sequence[float | None]]:
    """Returns seed -> what each example came to: 1, 0, or None where the verifier abstained; of a text nats."""
    found = {
        cell.seed: cell.measured[task][strategy]
        for cell in cells
        if cell.method == method and strategy in cell.measured.get(task, {})
    }
    signs = {"1": 1.0, "0": 0.0, "-": None}
    return {seed: one["nats"] if "nats" in one else [signs[x] for x in one["correct"]] for seed, one in found.items()}


def _in_all(*groups: Mapping[int, Sequence[float | None]]) -> list[list[list[float]]]:
    """Returns each group's values by seed and example, of the examples that have one in all of them."""
    columns = list(zip(*(values for group in groups for values in group.values()), strict=True))
    kept = [i for i, column in enumerate(columns) if None not in column]
    return [[[value for i in kept if (value := row[i]) is not None] for row in group.values()] for group in groups]


def _mean(values: Sequence[Sequence[float]], *, text: bool) -> Summary:
    """Returns a cell of a table: an accuracy, or the mean loss of a text in nats per token."""
    if not text:
        return asdict(over_seeds([[value == 1.0 for value in row] for row in values]))
    nats, low, high = spread(values)
    return {"nats": nats, "low": low, "high": high, "n": len(values[0]), "seeds": len(values)}


def _training(cells: Sequence[GridCell], method: str, tasks: Sequence[str]) -> Summary | None:
    """Returns the mean figures of the trainings of a table's tasks; None if none of them was trained."""
    trained = [cell.trained[task] for cell in cells if cell.method == method for task in tasks if task in cell.trained]
    if not trained:
        return None
    figures: Summary = {
        key: fmean(values) if (values := [one[key] for one in trained if one[key] is not None]) else None
        for key in ("validation", *SHAPES)
    }
    return figures | {"runs": len(trained)}


def _baselines(cells: Sequence[GridCell], tasks: Sequence[str]) -> Summary:
    """Returns task -> what a constant and a random answer would score."""
    found: Summary = {}
    for cell in cells:
        for task in tasks:
            for figures in cell.measured.get(task, {}).values():
                found.setdefault(task, figures.get("baselines", {}))
    return found


def _curves(config: TablesConfig, cells: Sequence[GridCell]) -> list[Summary]:
    """Returns the curve of each training: [step, seconds so far, accuracy of rollouts, validation or null, KL]."""
    return [
        {"model": cell.model, "method": cell.method, "seed": cell.seed, "domain": domain, "base": figures["base"],
         "rows": figures["curve"]}
        for cell in cells
        for domain, figures in cell.trained.items()
    ]  # fmt: skip


def _of_strategies(cells: Sequence[GridCell], key: str) -> Summary:
    """Returns what strategies chose, by `model.method.seed task/strategy`: counts of labels, or mixtures."""
    return {
        f"{cell.name} {task}/{strategy}": figures[key]
        for cell in cells
        for task, by_strategy in cell.measured.items()
        for strategy, figures in by_strategy.items()
        if figures.get(key)
    }


def _warnings(cells: Sequence[GridCell]) -> list[str]:
    """Returns which tasks were asked rows that chose their expert, and which answers are odd."""
    figures = [
        (f"{cell.name}, {task} {strategy}", task, figures)
        for cell in cells
        for task, by_strategy in cell.measured.items()
        for strategy, figures in by_strategy.items()
    ]
    seen = dict.fromkeys(task for _, task, one in figures if not one.get("unseen", True))
    told = [f"{task}: these rows chose the expert in training; name others by test: in its domain" for task in seen]
    return told + [f"{what}: {one['warning']}" for what, _, one in figures if one["warning"]]


def _missing(config: TablesConfig, cells: Sequence[GridCell]) -> dict[str, str]:
    """Returns what is not there, by `model.method.seed task/strategy`, with the reason."""
    lines: dict[str, str] = {}
    for cell in cells:
        for task, strategy in cell.lacks(config):
            others = config.unseen | config.texts
            expert = others[task].expert if task in others else task
            why = cell.missing.get(f"{task}/{strategy}") or cell.missing.get(expert)
            lines[f"{cell.name} {task}/{strategy}"] = why or ("cut off" if cell.machine else "not begun")
    return lines


def flat(cells: Sequence[GridCell]) -> list[dict[str, Any]]:
    """Returns a row per model, method, seed, task and strategy, with the figures of the training where it is one's."""
    rows = []
    for cell in cells:
        for task, by_strategy in cell.measured.items():
            for strategy, figures in by_strategy.items():
                trained = cell.trained.get(task, {}) if strategy == EXPERT else {}
                rows.append(
                    {"model": cell.model, "method": cell.method, "seed": cell.seed, "task": task, "strategy": strategy,
                     **{key: figures.get(key) for key in ("correct", "nats", "pass1_s", "pass2_s", *SEARCH)},
                     "mixture": figures.get("mixture"), "warning": figures["warning"],
                     **{key: trained.get(key) for key in ("base", "validation", "best_step", "steps", *SHAPES)},
                     "machine": cell.machine, "date": cell.date, "weights": cell.base_digest}
                )  # fmt: skip
    return rows
