"""What the terminal shows while experts are trained: a live line for each domain."""

from __future__ import annotations

import time

from rich.live import Live
from rich.table import Table

from t2ray.cli.output import console
from t2ray.config.train import TrainConfig
from t2ray.training.domain import domain_store, finished
from t2ray.training.metrics import read_metrics, seconds_left

_PLAIN_EVERY_S = 10.0


class TrainingDisplay:
    """A live table in a terminal; elsewhere a plain line per domain every ten seconds."""

    def __init__(self) -> None:
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.printed = time.monotonic()

    def __enter__(self) -> TrainingDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, config: TrainConfig) -> None:
        """Reads each domain's metrics from the run folder and draws them."""
        if self.live:
            self.live.update(_table(config), refresh=True)
        elif time.monotonic() - self.printed > _PLAIN_EVERY_S:
            self.printed = time.monotonic()
            for domain in config.domains:
                console.print(f"{domain}: {', '.join(f'{k} {v}' for k, v in _line(config, domain).items())}")


def _table(config: TrainConfig) -> Table:
    table = Table("domain", "step", "reward", "accuracy", "validation", "KL", "tokens/s", "left", box=None)
    for domain in config.domains:
        table.add_row(domain, *_line(config, domain).values())
    return table


def _line(config: TrainConfig, domain: str) -> dict[str, str]:
    """The newest figures of a domain; `left` is the steps left at the pace of the last ten."""
    store = domain_store(config, domain)
    rows, steps = read_metrics(store), config.domain_rl(domain).steps
    if not rows:
        return dict.fromkeys(("step", "reward", "accuracy", "validation", "KL", "tokens/s"), "-") | {"left": "starting"}
    last = rows[-1]
    return {
        "step": f"{last.step}/{steps}",
        "reward": f"{last.reward_mean:+.3f}",
        "accuracy": f"{last.accuracy:.3f}",
        "validation": next((f"{row.validation:.3f}" for row in reversed(rows) if row.validation is not None), "-"),
        "KL": f"{last.kl:.4f}",
        "tokens/s": f"{last.tokens_per_s:.0f}",
        "left": "done" if finished(store) else f"{seconds_left(rows, steps):.0f} s",
    }
