"""The display shows in the terminal how training stands: a live line for each domain, and alarms as they come."""

from __future__ import annotations

import sys
import time

from rich.live import Live
from rich.table import Table

from t2ray.cli.output import console
from t2ray.config.train import TrainConfig
from t2ray.training.domain import domain_store, finished
from t2ray.training.metrics import StepMetrics, notes, read_metrics, seconds_left

_PLAIN_EVERY_S = 10.0


class TrainingDisplay:
    """Draws a live table in a terminal; elsewhere it prints a line per domain every ten seconds.

    Alarms go to standard error.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.printed = time.monotonic()
        self.told = {(domain, line) for domain in config.trains for line in notes(domain_store(config, domain))}

    def __enter__(self) -> TrainingDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, config: TrainConfig) -> None:
        """Reads each domain's metrics and notes from the run folder, draws the metrics, and tells the new notes."""
        self.tell(config)
        if self.live:
            self.live.update(_table(config), refresh=True)
        elif time.monotonic() - self.printed > _PLAIN_EVERY_S:
            self.printed = time.monotonic()
            for domain in config.trains:
                console.print(f"{domain}: {', '.join(f'{k} {v}' for k, v in _line(config, domain).items())}")

    def tell(self, config: TrainConfig) -> None:
        """Writes what was noted since the last time to standard error."""
        for domain in config.trains:
            for line in notes(domain_store(config, domain)):
                if (domain, line) not in self.told:
                    self.told.add((domain, line))
                    print(f"t2ray: warning: {domain}: {line}", file=sys.stderr, flush=True)


_COLUMNS = (
    "step", "reward", "accuracy", "validation", "KL", "length", "cut", "alike", "faults", "tokens/s", "left",
)  # fmt: skip


def _table(config: TrainConfig) -> Table:
    table = Table("domain", *_COLUMNS, box=None)
    for domain in config.trains:
        table.add_row(domain, *_line(config, domain).values())
    return table


def _line(config: TrainConfig, domain: str) -> dict[str, str]:
    """Returns the newest figures of a domain.

    `length` is the mean number of tokens of an answer, `cut` the share of answers that were cut, `alike` that of
    prompts whose samples have one reward. `left` is the time of the steps left at the pace of the last ten.
    """
    store = domain_store(config, domain)
    rows, steps = read_metrics(store), config.domain_rl(domain).steps
    if not rows:
        return dict.fromkeys(_COLUMNS, "-") | {"left": "starting"}
    last = rows[-1]
    skipped = sum(row.skipped or 0 for row in rows)
    values = (
        f"{last.step}/{steps}{f' ({skipped} skipped)' * bool(skipped)}",
        _number(last.reward_mean, "+.3f"),
        _number(last.accuracy, ".3f"),
        next((f"{row.validation:.3f}" for row in reversed(rows) if row.validation is not None), "-"),
        f"{last.kl:.4f}",
        _number(last.answer_tokens, ".0f"),
        _number(last.cut, ".0%"),
        _number(last.same_reward, ".0%"),
        faults(rows),
        f"{last.tokens_per_s:.0f}",
        "done" if finished(store) else f"{seconds_left(rows, steps):.0f} s",
    )
    return dict(zip(_COLUMNS, values, strict=True))


def faults(rows: list[StepMetrics]) -> str:
    """Returns what went wrong in the verifier so far, such as "4 timeouts, 1 error"; "none" if nothing did."""
    counts = {
        "timeout": sum(row.timeouts or 0 for row in rows), "error": sum(row.errors or 0 for row in rows),
        "abstained": sum(row.abstained or 0 for row in rows) - sum(row.errors or 0 for row in rows),
    }  # fmt: skip
    return (
        ", ".join(f"{n} {name}{'s' * (n > 1 and name != 'abstained')}" for name, n in counts.items() if n > 0) or "none"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
