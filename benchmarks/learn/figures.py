"""What the runs say: a row per side and learning rate, and how t2ray compares with the peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.learn.runs import SideRun
from benchmarks.learn.settings import Setting

Means = dict[str, Any]
"""Means over seeds, of one side with one learning rate; those of a target that no seed has missed, else None."""


def summed(runs: Sequence[SideRun], setting: Setting) -> list[Means]:
    """Returns a row per side and learning rate, in the order of the runs."""
    keys = list(dict.fromkeys((run.side, run.rate) for run in runs))
    return [_row([run for run in runs if (run.side, run.rate) == key], setting) for key in sorted(keys, key=_order)]


def _order(key: tuple[str, float]) -> tuple[int, float]:
    return ("t2ray", "rloo", "grpo").index(key[0]), key[1]


def _row(runs: Sequence[SideRun], setting: Setting) -> Means:
    ends = [run.learnt(setting) for run in runs]
    till = [run.steps[:end] for run, end in zip(runs, ends, strict=True) if end]
    whole = len(till) == len(runs)
    return {
        "side": runs[0].side, "rate": runs[0].rate, "numbers": runs[0].numbers, "seeds": len(runs),
        "learnt": len(till),
        "step_s": median(step["seconds"] for run in runs for step in run.steps[1:] or run.steps),
        "steps": fmean(map(len, till)) if whole else None,
        "seconds": fmean(sum(step["seconds"] for step in steps) for steps in till) if whole else None,
        "kl": fmean(steps[-1]["kl"] for steps in till) if whole else None,
        "highest_kl": max(step["kl"] for run in runs for step in run.steps),
        "fixed_kl": fmean(run.fixed_kl or 0.0 for run in runs),
        "right": fmean(run.steps[-1]["right"] for run in runs),
        "peak_gib": max(run.steps[-1]["peak_gib"] for run in runs),
    }  # fmt: skip


def compared(rows: Sequence[Means]) -> dict[str, Means]:
    """Returns, per peer, t2ray's time over the peer's: of a step, and until it is learnt.

    Each side has the learning rate with which it learnt soonest; "at no more KL" t2ray has the soonest of those that
    ended with at most the peer's KL, or the peer's of those with at most t2ray's, where t2ray has none.
    """
    return {side: _beside(rows, side) for side in dict.fromkeys(row["side"] for row in rows) if side != "t2ray"}


def _beside(rows: Sequence[Means], side: str) -> Means:
    ours = [row for row in rows if row["side"] == "t2ray" and row["seconds"]]
    theirs = [row for row in rows if row["side"] == side and row["seconds"]]
    found: Means = {"step": _steps(rows, "t2ray") / _steps(rows, side)}
    if not ours or not theirs:
        return found
    best, peer = min(ours, key=_seconds), min(theirs, key=_seconds)
    found["learnt"] = best["seconds"] / peer["seconds"]
    if near := [row for row in ours if row["kl"] <= peer["kl"]]:
        found["at_no_more_kl"] = min(map(_seconds, near)) / peer["seconds"]
    return found


def _steps(rows: Sequence[Means], side: str) -> float:
    return fmean(row["step_s"] for row in rows if row["side"] == side)


def _seconds(row: Means) -> float:
    return float(row["seconds"])


def table(rows: Sequence[Means]) -> str:
    """Returns the rows as a Markdown table."""
    head = "| side | lr | numbers | s per step | learnt | steps | seconds | KL there | highest KL | peak GiB |"
    lines = [head, "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |"]
    for row in rows:
        there = [f"{row[key]:{form}}" if row[key] is not None else "" for key, form in _THERE.items()]
        cells = [
            row["side"], f"{row['rate']:g}", f"{row['numbers']:,}", f"{row['step_s']:.2f}",
            f"{row['learnt']} of {row['seeds']}", *there, f"{row['highest_kl']:.2f}", f"{row['peak_gib']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_THERE = {"steps": ".1f", "seconds": ".1f", "kl": ".2f"}


def told(beside: Mapping[str, Means]) -> str:
    """Returns a line per peer, of how t2ray compares with it."""
    names = {"step": "a step", "learnt": "until it is learnt", "at_no_more_kl": "at no more KL"}
    return "\n".join(
        f"t2ray's time over {side}'s: "
        + ", ".join(f"{text} {found[key]:.2f}" if key in found else f"{text} -" for key, text in names.items())
        for side, found in beside.items()
    )
