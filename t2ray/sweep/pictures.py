"""A sweep's pictures, by matplotlib, as PNG: parallel coordinates over all settings, a heat map over two of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from t2ray.config.search import SweepConfig, job_at, value_at
from t2ray.store import Store
from t2ray.sweep.results import Trial, keys

_CELLS = 6  # cells into which the heat map divides a range


def draw(config: SweepConfig, trials: Sequence[Trial]) -> list[str]:
    """Writes `parallel.png` and `heatmap.png` of the trials that have a score; returns the files' names.

    The job's own trial has no place on an axis of numbers where the job leaves the number open.
    """
    ranges = [key for key, dimension in config.space.items() if dimension.values is None]
    scored = [t for t in trials if t.score is not None and all(t.point.get(key) is not None for key in ranges)]
    names = keys(config)
    jobs = [job_at(config, trial.point) for trial in scored]
    columns = {key: [value_at(job, key) for job in jobs] for key in names}
    scores = np.array([trial.score for trial in scored], dtype=float)
    ended = [trial.status == "done" for trial in scored]
    store = Store(f"{config.out}/{config.run}")
    store.write_bytes("parallel.png", parallel(columns, scores, ended))
    first, second = (names * 2)[:2] if config.kind == "cem" else ("rl.kl", "rl.lr")
    store.write_bytes("heatmap.png", heat_map((first, columns[first]), (second, columns[second]), scores))
    return ["parallel.png", "heatmap.png"]


def parallel(columns: dict[str, list[Any]], scores: np.ndarray[Any, Any], ended: Sequence[bool]) -> bytes:
    """Draws one line per trial through its settings to its score, in the score's colour; dotted if it was stopped."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        placed = [_places(values) for values in columns.values()]
        low, high = float(scores.min()), float(scores.max())
        norm = Normalize(low, high if high > low else low + 1e-9)
        last = (scores - low) / (high - low) if high > low else np.full(len(scores), 0.5)
        heights = np.vstack([*(at for at, _ in placed), last])
        for i in np.argsort(scores):
            style = "-" if ended[i] else ":"
            axes.plot(heights[:, i], style, color=matplotlib.colormaps["viridis"](norm(scores[i])), lw=1.6, alpha=0.85)
        for x, (_, ticks) in enumerate([*placed, (last, [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")])]):
            axes.axvline(x, color="#888888", lw=0.8)
            for y, text in ticks:
                axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
        axes.set_xticks(range(len(placed) + 1), [*columns, "score"])
        axes.set(ylim=(-0.06, 1.06), yticks=[], title="settings and score (dotted: stopped early)")
        axes.spines[:].set_visible(False)

    return _png(max(4.0, 1.6 * (len(columns) + 1)), 3.6, paint)


def heat_map(down: tuple[str, Sequence[Any]], across: tuple[str, Sequence[Any]], scores: np.ndarray[Any, Any]) -> bytes:
    """Draws the mean score over two settings: one cell per value, or per sixth of a range."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        (rows, row_names), (cells, cell_names) = _binned(down[1]), _binned(across[1])
        grid = np.full((len(row_names), len(cell_names)), np.nan)
        for r in range(len(row_names)):
            for c in range(len(cell_names)):
                here = scores[(rows == r) & (cells == c)]
                grid[r, c] = here.mean() if len(here) else np.nan
        mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap="viridis", edgecolors="white", lw=1)
        axes.set_yticks(np.arange(len(row_names)) + 0.5, row_names)
        axes.set_xticks(np.arange(len(cell_names)) + 0.5, cell_names)
        axes.tick_params(length=0, labelsize=8)
        axes.set(xlabel=across[0], ylabel=down[0], title="mean score")
        for (r, c), value in np.ndenumerate(grid):
            if np.isfinite(value):
                ink = "#111111" if float(np.asarray(mesh.norm(np.asarray(value)), dtype=float)) > 0.6 else "#ffffff"
                axes.text(c + 0.5, r + 0.5, f"{value:.3f}", ha="center", va="center", fontsize=8, color=ink)
        figure.colorbar(mesh, ax=axes, fraction=0.05).outline.set_visible(False)

    return _png(5.2, 3.9, paint)


def _png(width: float, height: float, paint: Callable[[Figure], None]) -> bytes:
    out = io.BytesIO()
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def _numbers(values: Sequence[Any]) -> np.ndarray[Any, Any] | None:
    """Returns the values as numbers, as logarithms if they span more than a factor of 20; None if they are names."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return None
    numbers = np.array(values, dtype=float)
    wide = bool((numbers > 0).all()) and numbers.max() / numbers.min() > 20
    return np.log(numbers) if wide else numbers


def _places(values: Sequence[Any]) -> tuple[np.ndarray[Any, Any], list[tuple[float, str]]]:
    """Returns the heights of the values, in [0, 1], and the ticks of that axis."""
    numbers = _numbers(values)
    if numbers is None:
        names = sorted({json.dumps(value) for value in values})
        height = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
        return np.array([height[json.dumps(value)] for value in values]), [(y, n) for n, y in height.items()]
    low, high = numbers.min(), numbers.max()
    if low == high:
        return np.full(len(numbers), 0.5), [(0.5, f"{values[0]:.3g}")]
    return (numbers - low) / (high - low), [(0.0, f"{min(values):.3g}"), (1.0, f"{max(values):.3g}")]


def _binned(values: Sequence[Any]) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Returns the number of each value's cell, and the names of the cells."""
    numbers = _numbers(values)
    distinct = sorted(set(map(json.dumps, values)), key=lambda text: (len(text), text))
    if numbers is None or len(distinct) <= _CELLS:
        order = sorted(set(values)) if numbers is not None else [json.loads(text) for text in distinct]
        names = [f"{value:.3g}" if numbers is not None else json.dumps(value) for value in order]
        texts = [json.dumps(value) for value in order]
        return np.array([texts.index(json.dumps(value)) for value in values]), names
    edges = np.linspace(numbers.min(), numbers.max(), _CELLS + 1)
    cells = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, _CELLS - 1)
    ends = np.exp(edges) if not np.allclose(numbers, np.array(values, dtype=float)) else edges
    return cells, [f"{low:.2g} to {high:.2g}" for low, high in zip(ends[:-1], ends[1:], strict=True)]
