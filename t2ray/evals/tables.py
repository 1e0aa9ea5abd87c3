"""The tables and curves of a grid of measurements: what its cells say, with intervals and paired tests. No torch.

`summary` has every figure and is written as `tables.json`; Markdown, Parquet and pictures are made of it alone, so that
a page can be rendered again from the file. Not here: how cells are made (`cluster.train.cells`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from t2ray.config.tables import BASE, EXPERT, TableConfig, TablesConfig
from t2ray.evals.answers import baseline_cells
from t2ray.evals.cells import GridCell
from t2ray.evals.intervals import over_seeds, paired

Summary = dict[str, Any]
"""What `tables.json` holds; every value is plain."""

SHAPES = {"numbers": 0, "seconds": 1, "peak_gib": 2, "kl": 3}
"""What a training is told by beside its accuracy -> the number of decimals that tables show."""


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
        for method, strategy in table.rows:
            answers = {task: _correct(mine, method, strategy, task) for task in table.tasks}
            row: Summary = {"model": model, "method": method, "strategy": strategy, "tasks": {}}
            for task, by_seed in answers.items():
                (right,) = _graded(by_seed)
                if not by_seed or not right[0]:
                    continue
                row["tasks"][task] = asdict(over_seeds(right)) | {"of_seeds": [*by_seed]}
                other = _correct(mine, reference, its_strategy, task)
                if other and (method, strategy) != (reference, its_strategy):
                    ours, theirs = _graded(by_seed, other)
                    difference = paired(ours, theirs)
                    row["tasks"][task]["difference"] = asdict(difference)
            row["training"] = _training(mine, method, table.tasks) if strategy == EXPERT else None
            row["pass1"] = _pass1(mine, method, strategy, table.tasks)
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


def _correct(cells: Sequence[GridCell], method: str, strategy: str, task: str) -> dict[int, str]:
    """Returns seed -> a sign for each example, 1, 0 or - where the verifier abstained, of the seeds that are there."""
    return {
        cell.seed: cell.measured[task][strategy]["correct"]
        for cell in cells
        if cell.method == method and strategy in cell.measured.get(task, {})
    }


def _graded(*groups: Mapping[int, str]) -> list[list[list[bool]]]:
    """Returns whether each example was answered right, by group and seed; of examples that all of them have graded."""
    signs = list(zip(*(by_seed for group in groups for by_seed in group.values()), strict=True))
    kept = [i for i, column in enumerate(signs) if "-" not in column]
    return [[[row[i] == "1" for i in kept] for row in group.values()] for group in groups]


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
                found.setdefault(task, figures["baselines"])
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
    return [
        f"{cell.name}, {task} {strategy}: {figures['warning']}"
        for cell in cells
        for task, by_strategy in cell.measured.items()
        for strategy, figures in by_strategy.items()
        if figures["warning"]
    ]


def _missing(config: TablesConfig, cells: Sequence[GridCell]) -> dict[str, str]:
    """Returns what is not there, by `model.method.seed task/strategy`, with the reason."""
    lines: dict[str, str] = {}
    for cell in cells:
        for task, strategy in cell.lacks(config):
            expert = config.unseen[task].expert if task in config.unseen else task
            why = cell.missing.get(f"{task}/{strategy}") or cell.missing.get(expert)
            lines[f"{cell.name} {task}/{strategy}"] = why or ("cut off" if cell.machine else "not begun")
    return lines


# ------------------------------------------------------------------------------------------------------------- Markdown


def markdown(found: Summary) -> str:
    """Returns the tables as Markdown, with what they rest on and what is missing."""
    parts = [f"# {found['run']}", _rests_on(found)]
    for table in found["tables"].values():
        parts += [f"## {table['title']}", table_text(table)]
        if table["against"]:
            parts += [f"Difference to {table['against']}, in points, with its 95 % interval and p:", differences(table)]
        if any(row["pass1"] for row in table["rows"]):
            parts += ["Time of pass 1, in % of that of pass 2:", times(table)]
    for key, title in (("dispatched", "What pass 1 chose"), ("mixtures", "Few-shot mixtures")):
        if found[key]:
            lines = [[what, _chosen(one)] for what, one in found[key].items()]
            parts += [f"## {title}", _aligned([["cell", "chosen"], *lines])]
    if found["warnings"]:
        parts += ["## Warnings", "\n".join(f"- {line}" for line in found["warnings"])]
    if found["missing"]:
        parts += ["## Missing", "\n".join(f"- {what}: {why}" for what, why in found["missing"].items())]
    return "\n\n".join(parts) + "\n"


def _rests_on(found: Summary) -> str:
    seeds = ", ".join(map(str, found["seeds"]))
    return (
        f"Accuracy in %, mean over seeds, with its 95 % interval over examples and seeds. Seeds {seeds}; a smaller "
        f"number of them is said in the cell. {found['seconds'] / 3600:.1f} hours on {' and '.join(found['machines'])}."
    )


def table_text(table: Mapping[str, Any]) -> str:
    """Returns one table: a row per model, method and strategy, a column per task, then what the training took."""
    tasks, several = table["tasks"], len({row["model"] for row in table["rows"]}) > 1
    trained = any(row["training"] for row in table["rows"])
    most = max((cell["seeds"] for row in table["rows"] for cell in row["tasks"].values()), default=1)
    head = [*(["model"] if several else []), "method", "answers", *tasks]
    head += ["numbers", "seconds", "peak GiB", "KL (nats)"] if trained else []
    lines = [head]
    for row in table["rows"]:
        line = [*([row["model"]] if several else []), row["method"], row["strategy"]]
        line += [_cell(row, task, most) for task in tasks]
        if trained:
            figures = row["training"] or {}
            line += [
                f"{figures[key]:,.{digits}f}" if figures.get(key) is not None else "" for key, digits in SHAPES.items()
            ]
        lines.append(line)
    for name, at in (("majority", 0), ("random", 1)):
        answers = {task: baseline_cells(table["baselines"].get(task, {}))[at] for task in tasks}
        if set(answers.values()) != {"-"}:
            rest = [""] * (len(head) - len(tasks) - 1 - several)
            lines.append([*([""] if several else []), name, *rest[:1], *answers.values(), *rest[1:]])
    return _aligned(lines)


def _cell(row: Mapping[str, Any], task: str, most: int) -> str:
    cell = row["tasks"].get(task)
    if cell is None:
        return "missing"
    fewer = "" if cell["seeds"] == most or row["method"] == BASE else f", seeds {cell['seeds']}"
    return f"{100 * cell['acc']:.1f} ({100 * cell['low']:.1f}-{100 * cell['high']:.1f}; n {cell['n']}{fewer})"


def differences(table: Mapping[str, Any]) -> str:
    """Returns how far each row is from the one that the table compares with."""
    several = len({row["model"] for row in table["rows"]}) > 1
    lines = [[*(["model"] if several else []), "method", "answers", *table["tasks"]]]
    for row in table["rows"]:
        gains = {task: cell.get("difference") for task, cell in row["tasks"].items()}
        if any(gains.values()):
            line = [*([row["model"]] if several else []), row["method"], row["strategy"]]
            lines.append([*line, *(_gain(gains.get(task)) for task in table["tasks"])])
    return _aligned(lines)


def times(table: Mapping[str, Any]) -> str:
    """Returns the time of pass 1 as a share of that of pass 2, where there is a pass 1 (the paper's table 3)."""
    lines = [["model", "method", "answers", *table["tasks"]]]
    for row in table["rows"]:
        if row["pass1"]:
            shares = [f"{100 * row['pass1'][task]:.0f}" if task in row["pass1"] else "" for task in table["tasks"]]
            lines.append([row["model"], row["method"], row["strategy"], *shares])
    return _aligned(lines)


def _chosen(one: str | Mapping[str, int]) -> str:
    return one if isinstance(one, str) else ", ".join(f"{label} {count}" for label, count in one.items())


def _gain(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return ""
    gain, low, high = (100 * difference[key] for key in ("gain", "low", "high"))
    p = difference["p"]
    return f"{gain:+.1f} ({low:+.1f} to {high:+.1f}), p {'< 0.001' if p < 0.001 else f'{p:.3f}'}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([rows[0], "| " + " | ".join("-" * width for width in widths) + " |", *rows[1:]])


# -------------------------------------------------------------------------------------------------------------- Parquet


def flat(cells: Sequence[GridCell]) -> list[dict[str, Any]]:
    """Returns a row per model, method, seed, task and strategy, with the figures of the training where it is one's."""
    rows = []
    for cell in cells:
        for task, by_strategy in cell.measured.items():
            for strategy, figures in by_strategy.items():
                trained = cell.trained.get(task, {}) if strategy == EXPERT else {}
                rows.append(
                    {"model": cell.model, "method": cell.method, "seed": cell.seed, "task": task, "strategy": strategy,
                     "n": len(figures["correct"]), "right": figures["correct"].count("1"),
                     "correct": figures["correct"], "pass1_s": figures["pass1_s"], "pass2_s": figures["pass2_s"],
                     "mixture": figures.get("mixture"), "warning": figures["warning"],
                     **{key: trained.get(key) for key in ("base", "validation", "best_step", "steps", *SHAPES)},
                     "machine": cell.machine, "date": cell.date, "weights": cell.base_digest}
                )  # fmt: skip
    return rows
