"""The record that a change must not fall behind: docs/results.json, and a quick run that is held against it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.core.shape import BenchShape
from benchmarks.harness import Figures, Measure
from t2ray.core import ConfigError

RECORD = Path(__file__).parents[2] / "docs" / "results.json"
SHAPE = BenchShape(layers=2)
BENCHES = ("rows", "folded", "update", "rollout")
REPEATS = 3
TOLERANCE = 1.5
"""By what factor a ratio may be worse than the record: another processor changes it by up to 1.3."""


def behind(results: Mapping[str, Figures], record: Mapping[str, Any]) -> list[str]:
    """Returns a line for each ratio that is worse than the record by more than `TOLERANCE`.

    Ratios are the figures that have a target; seconds depend on the machine and are not compared.

    Raises:
        ConfigError: the record lacks one of them.
    """
    lines = []
    for bench, figures in results.items():
        for name, figure in figures.items():
            if not isinstance(figure, Measure) or figure.target is None:
                continue
            try:
                recorded = float(record[bench][name]["value"])
            except (KeyError, TypeError):
                raise ConfigError(
                    f"the record has no {bench}.{name}; make it anew: python -m benchmarks --quick --json {RECORD}"
                ) from None
            worse = figure.value / recorded if figure.at_most else recorded / figure.value
            if worse > TOLERANCE:
                lines.append(
                    f"{bench}.{name} is {figure.value:.3g}, {worse:.2f} times worse than the record of {recorded:.3g}"
                )
    return lines


def read() -> Mapping[str, Any]:
    """Returns the record.

    Raises:
        ConfigError: there is none, which is so outside of a checkout.
    """
    if not RECORD.is_file():
        raise ConfigError(f"there is no record {RECORD}; make it: python -m benchmarks --quick --json {RECORD}")
    record: Mapping[str, Any] = json.loads(RECORD.read_text())
    return record
