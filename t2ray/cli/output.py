"""Output to the terminal: the console, a progress bar with the time left, and bars of mixing weights.

Every command prints through `console`, with `markup=False` if the text is not the own text of the program.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from t2ray.core import ConfigError, Mixture, ResourceError

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
    """Returns a line per expert: a bar of its weight, which is full at the largest weight or at 1.

    With weights by layer the bar shows their mean, and a level per layer follows it.
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


def check_json_folder(path: str | None, option: str = "--json") -> None:
    """Refuses a `--json FILE` (or that of another option) that cannot be written, before the work and not after it.

    Raises:
        ConfigError: with the file as it was written.
    """
    if path is not None and Path(path).is_dir():
        raise ConfigError(f"{option} {path} is a folder; name a file")
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {Path(path).absolute().parent}; make it first")


def write_json(path: str | None, report: Mapping[str, Any]) -> None:
    """Writes the whole report to the file of `--json`, or nothing; does nothing if no file was named.

    Raises:
        ResourceError: the disk is full, or the file may not be written.
    """
    if path is not None:
        write_whole(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode(), "--json")


def write_whole(path: str, data: bytes, option: str) -> None:
    """Writes the file that an option names, whole or not at all.

    Raises:
        ResourceError: the disk is full, or the file may not be written.
    """
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"cannot write {path} ({error.strerror}); name another file by {option}") from None
