"""The terminal: its console, a progress bar with the time left, and bars of mixing weights. No torch, no ray.

Every command prints through `console`, with `markup=False` where the text is not the program's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from t2ray.core import Mixture

console = Console(highlight=False, soft_wrap=True)
_WIDTH, _LEVELS = 24, " ▁▂▃▄▅▆▇█"


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields `progress(done, total, name)` that draws a bar with the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)

        def update(done: int, total: int, name: str = "") -> None:
            progress.update(task, completed=done, total=total, description=f"{title} {name}".strip())

        yield update


def weight_bars(mixture: Mixture, experts: Sequence[str]) -> str:
    """A line an expert: a bar of its weight, full at the largest (at least 1); `-` in front of one below 0.

    With weights by layer the bar is their mean, followed by a level a layer.
    """
    weights: Mapping[str, tuple[float, ...]] = dict(mixture.weights)
    full = max(1.0, *(abs(w) for alpha in weights.values() for w in alpha)) if weights else 1.0
    width = max(map(len, experts), default=0)
    lines = []
    for name in experts:
        alpha = weights.get(name, (0.0,))
        mean = sum(alpha) / len(alpha)
        filled = round(_WIDTH * abs(mean) / full)
        levels = "".join(_LEVELS[round((len(_LEVELS) - 1) * abs(w) / full)] for w in alpha) if len(alpha) > 1 else ""
        drawn = "█" * filled + "·" * (_WIDTH - filled)
        lines.append(f"{name:<{width}}  {drawn} {mean:5.2f}  {levels}".rstrip())
    return "\n".join(lines)
