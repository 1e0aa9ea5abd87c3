"""How well pass 1 names the kind of a request: accuracy, calibration, thresholds, and what hangs on how it is asked.

It takes strategies that give every label a probability (`classify`). No torch. Not here: the prompts (`cli.dispatch`).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from t2ray.adapt.strategies import Dispatch, Strategy
from t2ray.core import ConfigError, Message
from t2ray.evals.intervals import wilson
from t2ray.evals.tabled import aligned
from t2ray.prompts import OTHERS

THRESHOLDS = (0.0, 0.5, 0.7, 0.9, 0.95, 0.99)
_BINS = 10
_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A request, the labels that are right for it, and the group of requests that it is counted in."""

    messages: tuple[Message, ...]
    labels: tuple[str, ...]
    group: str


async def name_all(strategy: Strategy, rows: Sequence[Labelled]) -> list[Dispatch]:
    """Returns what pass 1 decides for each request, in their order."""
    found: list[Dispatch] = []
    for start in range(0, len(rows), _AT_ONCE):
        found += await asyncio.gather(*(strategy(row.messages) for row in rows[start : start + _AT_ONCE]))
    return found


def figures(rows: Sequence[Labelled], dispatches: Sequence[Dispatch]) -> dict[str, Any]:
    """Returns the figures of one strategy: accuracy by group and in all, calibration, and what thresholds do.

    `ece` is the expected calibration error over ten bins of equal width of the likeliest label's probability (Guo et
    al. 2017): the mean distance of a bin's accuracy from its mean probability. `thresholds` say for each the share of
    requests that an expert answers, and the shares that are named right and that go to a wrong expert.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.group, []).append(i)
    right = [one.label in row.labels for row, one in zip(rows, dispatches, strict=True)]
    sure = [max(one.probabilities.values()) for one in dispatches]
    bins = _bins(right, sure)
    return {
        **_accuracy(right),
        "sure": fmean(sure),
        "ece": sum(one["n"] * abs(one["acc"] - one["sure"]) for one in bins) / len(rows),
        "bins": bins,
        "groups": {
            name: _accuracy([right[i] for i in places])
            | {"sure": fmean(sure[i] for i in places), "named": dict(Counter(dispatches[i].label for i in places))}
            for name, places in groups.items()
        },
        "thresholds": [_above(rows, dispatches, threshold) for threshold in THRESHOLDS],
    }


def _accuracy(right: Sequence[bool]) -> dict[str, Any]:
    return {"n": len(right), "acc": fmean(right), "ci95": list(wilson(sum(right), len(right)))}


def _bins(right: Sequence[bool], sure: Sequence[float]) -> list[dict[str, Any]]:
    places: dict[int, list[int]] = {}
    for i, p in enumerate(sure):
        places.setdefault(min(int(p * _BINS), _BINS - 1), []).append(i)
    return [
        {"n": len(inside), "sure": fmean(sure[i] for i in inside), "acc": fmean(right[i] for i in inside)}
        for _, inside in sorted(places.items())
    ]


def _above(rows: Sequence[Labelled], dispatches: Sequence[Dispatch], threshold: float) -> dict[str, Any]:
    named = [
        one.label if one.label is not None and one.probabilities[one.label] >= threshold else OTHERS
        for one in dispatches
    ]
    right = [label in row.labels for row, label in zip(rows, named, strict=True)]
    return {
        "threshold": threshold,
        "answered": fmean(label != OTHERS for label in named),
        "acc": fmean(right),
        "wrong": fmean(label != OTHERS and not ok for label, ok in zip(named, right, strict=True)),
    }


# ------------------------------------------------------------------------------------------------- how it is asked


def variants(labels: Sequence[str], orders: int, names: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Returns other ways to ask: a title -> the labels as they are shown, in their order, each with what it stands for.

    They are `orders` random orders, and for each title of `names` the labels by other names.

    Raises:
        ConfigError: a label is named that there is not, is "others", or gets the name of another.
    """
    rng = random.Random(0)
    asked = {f"order {i + 1}": {label: label for label in rng.sample(labels, len(labels))} for i in range(orders)}
    for title, other in names.items():
        shown = {other.get(label, label): label for label in labels}
        if not {*other} <= {*labels} - {OTHERS} or len(shown) < len(labels):
            raise ConfigError(f"--names {title}: give names of their own to some of {', '.join(labels[:-1])}")
        asked[title] = shown
    return asked


async def changed(
    strategy_of: Callable[[tuple[str, ...]], Strategy],
    rows: Sequence[Labelled],
    own: Sequence[Dispatch],
    asked: Mapping[str, Mapping[str, str]],
) -> dict[str, dict[str, Any]]:
    """Returns the accuracy under each other way to ask, and the share of requests that it names otherwise.

    Args:
        strategy_of: the strategy that chooses from these labels.
        own: what is decided with the labels as they are.
        asked: as `variants` has them.
    """
    found = {}
    for title, shown in asked.items():
        dispatches = await name_all(strategy_of(tuple(shown)), rows)
        labels = [shown[one.label] for one in dispatches if one.label is not None]
        found[title] = {
            "acc": fmean(label in row.labels for row, label in zip(rows, labels, strict=True)),
            "changed": fmean(label != before.label for label, before in zip(labels, own, strict=True)),
        }
    return found


# ------------------------------------------------------------------------------------------------------- what is told


def told(found: Mapping[str, Any]) -> str:
    """Returns the figures of all strategies as Markdown tables."""
    by_strategy: Mapping[str, Mapping[str, Any]] = found["strategies"]
    names = list(by_strategy)
    one = next(iter(by_strategy.values()))
    kinds = [["requests", "n", *names]]
    for group, size in [*((group, row["n"]) for group, row in one["groups"].items()), ("all", one["n"])]:
        rows = [figures["groups"].get(group, figures) for figures in by_strategy.values()]
        kinds.append([group, str(size), *map(_cell, rows)])
    kinds.append(["ECE", "", *(f"{figures['ece']:.3f}" for figures in by_strategy.values())])
    least = [["threshold", "strategy", "an expert answers", "named right", "a wrong expert answers"]]
    for name, figures in by_strategy.items():
        for row in figures["thresholds"]:
            shares = [f"{100 * row[key]:.1f}" for key in ("answered", "acc", "wrong")]
            least.append([f"{row['threshold']:g}", name, *shares])
    ways = [["labels", *(f"{name}: {what}" for name in names for what in ("right", "named otherwise"))]]
    for title in one["asked"]:
        shares = [f"{100 * figures['asked'][title][key]:.1f}" for figures in by_strategy.values()
                  for key in ("acc", "changed")]  # fmt: skip
        ways.append([title, *shares])
    return "\n\n".join(aligned(lines) for lines in (kinds, least, ways) if len(lines) > 1)


def _cell(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    most = sorted(row.get("named", {}).items(), key=lambda pair: -pair[1])
    chosen = f": {', '.join(f'{label} {count}' for label, count in most)}" if row["acc"] < 1 and most else ""
    sure = f", sure {100 * row['sure']:.0f}" if "sure" in row else ""
    return f"{100 * row['acc']:.1f} ({100 * low:.0f}-{100 * high:.0f}){sure}{chosen}"
