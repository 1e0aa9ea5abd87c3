"""What the seeds of a fifth domain say, as lines and tables of Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from t2ray.evals.tabled import aligned

SeedFound = Mapping[str, Any]
"""What one seed measured; see `command`."""
PHASES = ("before", "after")


def told(seeds: Sequence[SeedFound]) -> list[str]:
    """Returns what is kept, pass 1 by kind of request, right answers by kind, and the searches."""
    return [_kept([seed["kept"] for seed in seeds]), _pass1(seeds), _right(seeds), _searches(seeds)]


def _kept(rows: Sequence[Mapping[str, Any]]) -> str:
    total = {key: sum(row[key] for row in rows) for key in ("files", "answers", "tokens", "differing")}
    changed = sum(len(row["changed"]) for row in rows)
    return (
        f"files: {total['files']} of before, {changed} changed; answers of the four: {total['answers']} with "
        f"{total['tokens']} tokens, {total['differing']} differ in a token or in a bit of a log-probability"
    )


def _pass1(seeds: Sequence[SeedFound]) -> str:
    ways = [(strategy, phase) for strategy in ("prompt", "cls") for phase in PHASES]
    lines = [["requests", *(f"{strategy}, {phase}" for strategy, phase in ways)]]
    for group in seeds[0]["after"]["pass1"]["cls"]["groups"]:
        lines.append([group, *(_named([_by(seed, way)["groups"][group] for seed in seeds]) for way in ways)])
    for title, key, digits in (("all", "acc", 1), ("ECE", "ece", 3)):
        scale = 100 if key == "acc" else 1
        lines.append([title, *(f"{scale * fmean(_by(seed, way)[key] for seed in seeds):.{digits}f}" for way in ways)])
    return aligned(lines)


def _by(seed: SeedFound, way: tuple[str, str]) -> Mapping[str, Any]:
    strategy, phase = way
    found: Mapping[str, Any] = seed[phase]["pass1"][strategy]
    return found


def _named(groups: Sequence[Mapping[str, Any]]) -> str:
    """Returns the share named right, and where that is not all, what was named in how many prompts of all seeds."""
    acc = fmean(group["acc"] for group in groups)
    named = sum((Counter(group["named"]) for group in groups), Counter[str]())
    chosen = ", ".join(f"{label} {count}" for label, count in named.most_common())
    return f"{100 * acc:.1f}" + (f": {chosen}" if acc < 1 else "")


def _right(seeds: Sequence[SeedFound]) -> str:
    ways = [("base", "after"), ("expert", "after"), *(("cls", phase) for phase in PHASES)]
    lines = [["requests", "base", "its expert", *(f"cls, {phase}" for phase in PHASES)]]
    for task in seeds[0]["after"]["right"]:
        lines.append(
            [task, *(_shares([seed[phase]["right"][task].get(name) for seed in seeds]) for name, phase in ways)]
        )
    return aligned(lines)


def _shares(found: Sequence[float | None]) -> str:
    """Returns the mean in %, and each seed's share where they differ."""
    shares = [100 * share for share in found if share is not None]
    if not shares:
        return ""
    each = f" ({', '.join(f'{share:.0f}' for share in shares)})" if len(set(shares)) > 1 else ""
    return f"{fmean(shares):.1f}{each}"


def _searches(seeds: Sequence[SeedFound]) -> str:
    lines = [["seed", "experts", "mixture found", "shots right", "test prompts right"]]
    for seed in seeds:
        for phase in PHASES:
            one = seed[phase]["search"]
            shares = [f"{100 * one[key]:.1f}" for key in ("shots", "acc")]
            lines.append([str(seed["seed"]), str(len(seed[phase]["experts"])), one["mixture"], *shares])
    return aligned(lines)
