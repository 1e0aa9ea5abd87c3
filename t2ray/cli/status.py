"""`t2ray status` shows how a run or a sweep stands. It reads the folder alone and asks no cluster."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table

from t2ray.cli.options import Parser
from t2ray.cli.output import console

if TYPE_CHECKING:
    from t2ray.runs.status import DomainStatus
    from t2ray.store import Store


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument("run", metavar="RUN", help="The folder of the run or the sweep: a local one, s3:// or gs://.")
    p.add_argument("--json", action="store_true", help="Print the figures as JSON.")


def run(args: argparse.Namespace) -> None:
    """Prints a line per domain, then its workers and checkpoint or its result, its trackers and what went wrong last.

    Raises:
        RunError: there is no run in that folder.
    """
    from t2ray.config.files import expanded
    from t2ray.runs.folder import read_run
    from t2ray.runs.status import read_status
    from t2ray.store import Store
    from t2ray.sweep.results import CONFIG as SWEEP

    store = Store(expanded(args.run))
    if store.exists(SWEEP):
        _sweep(store, as_json=args.json)
        return
    # the run may have been moved or mounted elsewhere since it was written: where it is now counts
    whole = store.uri if store.local is None else str(store.local)
    out, _, name = whole.rpartition("/")
    config = read_run(whole).model_copy(update={"out": out or "/", "run": name})
    domains = read_status(config)
    if args.json:
        console.print_json(json.dumps([asdict(domain) for domain in domains]))
        return
    table = Table("domain", "state", "step", "reward", "accuracy", "validation", "KL", "tokens/s", "left", box=None)
    for d in domains:
        figures = (_number(d.reward, "+.3f"), _number(d.accuracy, ".3f"), _number(d.validation, ".3f"),
                   _number(d.kl, ".4f"), _number(d.tokens_per_s, ".0f"), _seconds(d.left_s))  # fmt: skip
        table.add_row(d.domain, d.state, f"{d.step}/{d.steps}", *figures)
    console.print(table)
    for d in domains:
        for line in _details(d):
            console.print(f"{d.domain}: {line}", markup=False)


def _details(d: DomainStatus) -> list[str]:
    now, lines, r = time.time(), [], d.result
    if r is not None:
        lines.append(f"best: validation {r.accuracy:.3f} at step {r.best_step}; the base has {r.base_accuracy:.3f}")
        if not r.beats_base:
            lines.append("it never beat its base in validation")
    else:
        lines += [
            f"worker {w.rank} on {w.host} (pid {w.pid}), heard {_seconds(now - w.at)} ago at step {w.step}; {w.memory}"
            for w in d.workers
        ]
        if d.checkpoint is not None:
            lines.append(f"last checkpoint: step {d.checkpoint}")
    if d.cut is not None:
        alike = "" if d.same_reward is None else f"; {d.same_reward:.0%} of the prompts have one reward for all samples"
        lines.append(f"answers of {d.answer_tokens:.0f} tokens, {d.cut:.0%} of them cut{alike}")
    if d.skipped or d.timeouts or d.errors:
        lines.append(
            f"so far {d.skipped} steps without a signal, {d.timeouts} timeouts and {d.errors} errors of the verifier"
        )
    for name, track in d.trackers.items():
        more = f", not told more: {track.problem}" if track.problem else ""
        lines.append(f"{name}: told up to step {track.told}, run {track.id} in {track.where}{more}")
    lines += [f"{line}; `t2ray train --resume` mends what can be mended" for line in d.damaged]
    lines += [f"note: {line}" for line in d.notes]
    if d.fault is not None:
        lines.append(f"last error, {_seconds(now - d.fault.at)} ago: {d.fault.message}")
    return lines


def _sweep(store: Store, *, as_json: bool) -> None:
    """Prints how many trials are in which state, the best so far, and what failed."""
    from t2ray.sweep.results import read_rows

    rows = read_rows(store)
    if as_json:
        console.print_json(json.dumps(rows))
        return
    count = Counter(row["status"] for row in rows)
    console.print(f"{len(rows)} trials: " + (", ".join(f"{n} {state}" for state, n in count.items()) or "none began"))
    done = [row for row in rows if row["status"] == "done"]
    if done:
        best = max(done, key=lambda row: row["score"])
        console.print(f"best so far: {best['score']:.4f} with {best['point']}, seed {best['seed']}", markup=False)
    for row in rows:
        if row["error"]:
            console.print(f"failed with {row['point']}: {row['error']}", markup=False)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
