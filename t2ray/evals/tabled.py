"""The tables of a grid of measurements as Markdown, from the figures of `tables.json` alone. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from t2ray.config.tables import BASE
from t2ray.evals.answers import baseline_cells

TRAINED = (
    ("validation", "validation", 100, 1), ("numbers", "numbers", 1, 0), ("seconds", "seconds", 1, 0),
    ("peak_gib", "peak GiB", 1, 2), ("kl", "KL (nats)", 1, 3),
)  # fmt: skip
"""What tables show of trainings: the figure, its heading, what it is multiplied by, its decimals."""


def markdown(found: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """Returns the tables as Markdown, with what they rest on, the `pictures` (files beside it) and what is missing."""
    parts = [f"# {found['run']}", _rests_on(found)]
    for table in found["tables"].values():
        parts += [f"## {table['title']}", table_text(table)]
        if table["against"]:
            parts += [f"Difference to {table['against']}, in points, with its 95 % interval and p:", differences(table)]
        if any(row["pass1"] for row in table["rows"]):
            parts += ["Time of pass 1, in % of that of pass 2:", times(table)]
        if any(row["search"] for row in table["rows"]):
            parts += ["Answers that the few-shot search generated, and its seconds; means over seeds:", spent(table)]
    for key, title in (("dispatched", "What pass 1 chose"), ("mixtures", "Few-shot mixtures")):
        if found[key]:
            lines = [[what, _chosen(one)] for what, one in found[key].items()]
            parts += [f"## {title}", aligned([["cell", "chosen"], *lines])]
    if pictures:
        parts += ["## Pictures", "\n\n".join(f"![{name.removesuffix('.svg')}]({name})" for name in pictures)]
    if found["warnings"]:
        parts += ["## Warnings", "\n".join(f"- {line}" for line in found["warnings"])]
    if found["missing"]:
        parts += ["## Missing", "\n".join(f"- {what}: {why}" for what, why in found["missing"].items())]
    return "\n\n".join(parts) + "\n"


def _rests_on(found: Mapping[str, Any]) -> str:
    seeds, hours = ", ".join(map(str, found["seeds"])), found["seconds"] / 3600
    return (
        f"Accuracy in %, mean over seeds, with its 95 % interval over examples and seeds. Seeds {seeds}; a smaller "
        f"number of them is said in the cell. {hours:.1f} hours on {' and '.join(found['machines']) or 'no machine'}. "
        "Of trainings: greedy validation at the best step in %, trained numbers, seconds of the steps, most memory, "
        "and KL to the base per token at the best step."
    )


def table_text(table: Mapping[str, Any]) -> str:
    """Returns one table: a row per model, method and strategy, a column per task, then what the training took."""
    tasks, several = table["tasks"], len({row["model"] for row in table["rows"]}) > 1
    trained = any(row["training"] for row in table["rows"])
    most = max((cell["seeds"] for row in table["rows"] for cell in row["tasks"].values()), default=1)
    head = [*(["model"] if several else []), "method", "answers", *tasks]
    head += [heading for _, heading, _, _ in TRAINED] if trained else []
    lines = [head]
    for row in table["rows"]:
        line = [*([row["model"]] if several else []), row["method"], row["strategy"]]
        line += [_cell(row, task, most) for task in tasks]
        if trained:
            figures = row["training"] or {}
            line += [
                "" if figures.get(key) is None else f"{scale * figures[key]:,.{digits}f}"
                for key, _, scale, digits in TRAINED
            ]
        lines.append(line)
    for name, at in (("majority", 0), ("random", 1)):
        answers = {task: baseline_cells(table["baselines"].get(task, {}))[at] for task in tasks}
        if set(answers.values()) != {"-"}:
            rest = [""] * (len(head) - len(tasks) - 1 - several)
            lines.append([*([""] if several else []), name, *rest[:1], *answers.values(), *rest[1:]])
    return aligned(lines)


def _cell(row: Mapping[str, Any], task: str, most: int) -> str:
    cell = row["tasks"].get(task)
    if cell is None:
        return "missing"
    fewer = "" if cell["seeds"] == most or row["method"] == BASE else f", seeds {cell['seeds']}"
    if "nats" in cell:
        low, mean, high = (math.exp(cell[key]) for key in ("low", "nats", "high"))
        return f"perplexity {mean:.2f} ({low:.2f}-{high:.2f}; n {cell['n']}{fewer})"
    return f"{100 * cell['acc']:.1f} ({100 * cell['low']:.1f}-{100 * cell['high']:.1f}; n {cell['n']}{fewer})"


def differences(table: Mapping[str, Any]) -> str:
    """Returns how far each row is from the one that the table compares with."""
    several = len({row["model"] for row in table["rows"]}) > 1
    lines = [[*(["model"] if several else []), "method", "answers", *table["tasks"]]]
    for row in table["rows"]:
        if any("difference" in cell for cell in row["tasks"].values()):
            line = [*([row["model"]] if several else []), row["method"], row["strategy"]]
            lines.append([*line, *(_gain(row["tasks"].get(task, {})) for task in table["tasks"])])
    return aligned(lines)


def times(table: Mapping[str, Any]) -> str:
    """Returns the time of pass 1 as a share of that of pass 2, where there is a pass 1 (the paper's table 3)."""
    lines = [["model", "method", "answers", *table["tasks"]]]
    for row in table["rows"]:
        if row["pass1"]:
            shares = [f"{100 * row['pass1'][task]:.0f}" if task in row["pass1"] else "" for task in table["tasks"]]
            lines.append([row["model"], row["method"], row["strategy"], *shares])
    return aligned(lines)


def spent(table: Mapping[str, Any]) -> str:
    """Returns what the few-shot searches of a table spent (the paper's table 10), where there are any."""
    lines = [["model", "method", "answers", *table["tasks"]]]
    for row in table["rows"]:
        if row["search"]:
            found = [row["search"].get(task) for task in table["tasks"]]
            cells = [f"{one['prompts']:,.0f} answers, {one['seconds']:,.0f} s" if one else "" for one in found]
            lines.append([row["model"], row["method"], row["strategy"], *cells])
    return aligned(lines)


def _chosen(one: str | Mapping[str, int]) -> str:
    return one if isinstance(one, str) else ", ".join(f"{label} {count}" for label, count in one.items())


def _gain(cell: Mapping[str, Any]) -> str:
    if "difference" not in cell:
        return ""
    gain, low, high, p = (cell["difference"][key] for key in ("gain", "low", "high", "p"))
    if "nats" in cell:
        return f"{gain:+.3f} nats a token ({low:+.3f} to {high:+.3f}), {chance(p)}"
    return f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}), {chance(p)}"


def chance(p: float) -> str:
    """Returns the p of a test as it is told: `p 0.012`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Returns lines of cells as a Markdown table, the first line as its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([rows[0], "| " + " | ".join("-" * width for width in widths) + " |", *rows[1:]])
