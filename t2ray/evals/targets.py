"""The targets of the tiny model, and whether a report reaches them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

METHODS = ("base", "expert", "oracle", "prompt", "cls", "fewshot")
"""The columns of a table, in their order; `methods` says what each is."""


def targets(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the targets of the tiny model that were measured, each as `{name, target, value, met}`.

    "The best expert" of the unseen tasks is each task's own oracle, the strictest reading.
    """
    trained, unseen = report["tables"]["trained"], report["tables"]["unseen"]
    rows: list[dict[str, Any]] = []

    def at_least(name: str, target: float, value: float) -> None:
        value = round(value, 9)  # 0.95 - 0.55 is below 0.4 in floating point
        rows.append({"name": f"{name}, at least", "target": target, "value": value, "met": value >= target})

    classifier = {"dispatch": report["classifier"]} if report["classifier"] else {}
    for task, row in (trained | classifier).items():
        if "expert" in row and "base" in row:
            at_least(f"{task}: accuracy of its expert", 0.80, row["expert"]["acc"])
            at_least(f"{task}: its expert above the base", 0.40, row["expert"]["acc"] - row["base"]["acc"])
    means = _means(trained)
    dispatched = [means[name] for name in ("prompt", "cls") if name in means]
    if dispatched and means.get("oracle", 0.0) > 0:
        at_least("trained tasks: the better of prompt and cls over oracle", 0.95, max(dispatched) / means["oracle"])
    means = _means(unseen)
    if {"fewshot", "base", "oracle"} <= means.keys():
        gain = round(min(row["fewshot"]["acc"] - row["base"]["acc"] for row in unseen.values()), 9)
        name = "unseen tasks: the smallest gain of fewshot over base, above"
        rows.append({"name": name, "target": 0.0, "value": gain, "met": gain > 0})
        at_least("unseen tasks: mean of fewshot against that of the best expert", means["oracle"], means["fewshot"])
    share = report["pass1_share"]
    if share is not None:
        name = "pass 1 as a share of pass 2 at 64 new tokens, at most"
        rows.append({"name": name, "target": 0.10, "value": share, "met": share <= 0.10})
    return rows


def _means(table: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns method -> mean accuracy over a table's tasks, for each method that all tasks have."""
    return {
        method: fmean(row[method]["acc"] for row in table.values())
        for method in METHODS
        if table and all(method in row for row in table.values())
    }
