"""What `t2ray eval` writes and prints of the tasks that it measured. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from t2ray.evals.answers import Baseline, baseline_cells, shares
from t2ray.evals.evaluate import Cell, oracle_choice, warnings
from t2ray.evals.intervals import paired
from t2ray.evals.tabled import chance


def result_of(
    task: str, strategies: Sequence[str], cells: Mapping[str, Cell], baseline: Baseline, experts: Sequence[str],
    tokens: int, unseen: bool, against: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Returns the row of a task: `{"n": 200, "max_tokens": 24, "oracle": "math", "strategies": {"base": ..., ...}}`.

    Args:
        experts: those of which the oracle is the best, beside the base.
        tokens: the greatest number of tokens of an answer.
        unseen: whether the rows chose no expert.
        against: the strategy that the others are compared with, example by example.
    """
    rows = {name: _row(cell, baseline) for name, cell in cells.items()}
    n = len(next(iter(cells.values())).correct)
    result: dict[str, Any] = {"n": n, "max_tokens": tokens, "unseen": unseen, "baselines": baseline.row()}
    if "oracle" in strategies:
        result["oracle"] = oracle_choice({name: cells[name] for name in ("base", *experts)})
        rows["oracle"] = rows[result["oracle"]]
    differences: dict[str, Any] = {}
    if against is not None:
        theirs = cells[against].correct
        others = [name for name in strategies if name not in ("oracle", against)]
        for name in others:
            both = [(a, b) for a, b in zip(cells[name].correct, theirs, strict=True) if None not in (a, b)]
            if both:
                first, second = ([float(bool(x)) for x in column] for column in zip(*both, strict=True))
                differences[name] = asdict(paired([first], [second]))
    return result | {"strategies": rows, "differences": differences, "warnings": warnings(task, cells, baseline)}


def _row(cell: Cell, baseline: Baseline) -> dict[str, Any]:
    return cell.row() | {
        "truncated": cell.truncated, "too_long": cell.too_long, "abstained": cell.abstained,
        "labels": dict(cell.labels), "readings": shares(cell.readings, baseline.golds),
        "pass1_s": cell.pass1_s, "pass2_s": cell.pass2_s,
    }  # fmt: skip


def table(results: Mapping[str, Any], strategies: Sequence[str]) -> str:
    """Returns a line per task: accuracies in % with 95 % Wilson intervals; below them what went unanswered."""
    head = ["task", "n", "majority", "random", *strategies]
    body, notes = [], []
    for task, result in results.items():
        cells = baseline_cells(result["baselines"])
        for name in strategies:
            row = result["strategies"][name]
            low, high = row["ci95"]
            chosen = f" {result['oracle']}" if name == "oracle" else ""
            known = row["acc"] is not None
            cells.append(f"{100 * row['acc']:.1f} ({100 * low:.0f}-{100 * high:.0f}){chosen}" if known else "-")
            tokens = f"(max_tokens {result['max_tokens']})"
            for key, meaning in (
                ("too_long", f"prompts exceed the model's context {tokens}"),
                ("truncated", f"answers were cut off {tokens}"),
                ("abstained", "answers count nowhere: the verifier abstained from them"),
            ):
                if row[key] and name != "oracle":
                    notes.append(f"{task} {name}: {row[key]} of {result['n']} {meaning}")
        body.append([task, str(result["n"]), *cells])
        for name, gain in result["differences"].items():
            span = f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
            notes.append(f"{task} {name}: {100 * gain['gain']:+.1f} points ({span}), {chance(gain['p'])}")
        notes += result["warnings"]
        if not result["unseen"]:
            notes.append(f"{task}: these rows chose the expert in training; name others by test: in its domain")
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *body]]
    return "\n".join(line.rstrip() for line in [*lines, *notes])
