"""The report's figures, by matplotlib, as SVG text to put into a page. No torch.

Ink and grid have the colours `currentColor` and `var(--line)`, and text stays text, so that one figure suits a light
and a dark page. Every figure is about 380 px wide: a phone shows one per row, a wide screen several.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from t2ray.experts.heatmap import HeatMap
from t2ray.prompts import OTHERS

INK, LINE = "#010203", "#040506"  # stand for the page's colours until the SVG is written
SERIES = ("#3b82c4", "#d97706", "#2f9e6e", "#b05cc6", "#d14d6b", "#7a8b2a")
DASHES = ("-", "--", ":", "-.")
WIDTH = 3.95  # inches of 96 px


def _svg(name: str, height: float, draw: Callable[[Figure], None]) -> str:
    style = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": LINE, "xtick.color": INK, "ytick.color": INK, "grid.color": LINE, "axes.titlesize": 10,
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    }  # fmt: skip
    out = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(LINE, "var(--line)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    head, bracket, body = svg.partition(">")
    return re.sub(r' (width|height)="[^"]*"', "", head) + bracket + body  # the page sets the size


def _series(i: int) -> dict[str, Any]:
    """The colour of a line and its dashes, which are others where the colours begin again."""
    return {"color": SERIES[i % len(SERIES)], "linestyle": DASHES[i // len(SERIES) % len(DASHES)]}


def _legend(figure: Figure) -> None:
    """Puts the names of the lines below all axes, in as many columns as there is room for, and makes room for them."""
    lines = dict(zip(*figure.axes[0].get_legend_handles_labels()[::-1], strict=True))
    longest = max((len(name) for name in lines), default=1)
    columns = max(1, min(4, int(72 * WIDTH / (44 + 4.6 * longest))))  # points: the line's sample, the letters
    figure.legend(lines.values(), lines.keys(), loc="outside lower left", ncols=columns, fontsize=7.5)
    figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(lines) // columns))


def _title(figure: Figure, title: str) -> None:
    """Puts a title above all axes, in as many lines as it takes."""
    figure.suptitle(textwrap.fill(title, 48), x=0.02, ha="left", fontsize=10)


def curves(domain: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Draws a domain's metrics: accuracy of rollouts and of greedy validation above, KL to the base (nats) below."""
    steps = [row["step"] for row in rows]
    checked = [row for row in rows if "validation" in row]

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        rollouts = [row.get("accuracy", np.nan) for row in rows]
        above.plot(steps, rollouts, color=SERIES[0], lw=1.2, alpha=0.8, label="rollouts")
        above.plot(
            [row["step"] for row in checked], [row["validation"] for row in checked],
            color=SERIES[1], marker="o", ms=3.5, lw=1.4, label="validation, greedy",
        )  # fmt: skip
        above.set(ylim=(-0.03, 1.03), ylabel="accuracy", title=domain)
        above.legend(loc="lower right", fontsize=8)
        below.plot(steps, [row["kl"] for row in rows], color=SERIES[2], lw=1.2)
        below.set(ylabel="KL (nats)", xlabel="step")
        for axes in (above, below):
            axes.grid(lw=0.5)

    return _svg(f"curves-{domain}", 2.9, draw)


def alphas(mixtures: Mapping[str, Mapping[str, float | Sequence[float]]], title: str = "") -> str:
    """Draws one group of bars per task, one bar per expert; of weights per layer or seed, their mean and range."""
    experts = list(dict.fromkeys(name for row in mixtures.values() for name in row))
    step = 0.8 / max(1, len(experts))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, expert in enumerate(experts):
            weights = [np.atleast_1d(row.get(expert, 0.0)) for row in mixtures.values()]
            mean = np.array([w.mean() for w in weights])
            reach = np.array([(w.mean() - w.min(), w.max() - w.mean()) for w in weights]).T
            at = np.arange(len(mixtures)) + (i - (len(experts) - 1) / 2) * step
            axes.barh(
                at, mean, step * 0.9, color=SERIES[i % len(SERIES)], hatch="/" * 3 * (i // len(SERIES)), label=expert,
                xerr=reach if reach.any() else None, error_kw={"ecolor": INK, "elinewidth": 0.8},
            )  # fmt: skip
            for y, (value, beyond) in zip(at, zip(mean, reach[1], strict=True), strict=True):
                axes.text(max(value + beyond, 0.0) + 0.015, y, f"{value:.2f}", va="center", fontsize=7.5)
        axes.set_yticks(range(len(mixtures)), list(mixtures))
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.axvline(0, color=LINE, lw=0.8)
        axes.set(xlabel="alpha")
        axes.grid(axis="x", lw=0.5)
        axes.set_axisbelow(True)
        _title(figure, title)
        _legend(figure)

    return _svg(f"alphas-{title}", 0.8 + 0.22 * len(mixtures) * max(2, len(experts)), draw)


def heat_map(expert: str, heat: HeatMap, limit: float) -> str:
    """Draws a heat map: kinds of matrices down, layers across. `limit` ends the colour scale of all experts' maps.

    If any value is negative, the colours diverge from 0; else they start there.
    """
    kinds, layers = heat.kinds, heat.layers
    grid = np.array(heat.values, dtype=float).T
    signed = bool((grid < 0).any())
    norm = Normalize(-limit if signed else 0.0, limit)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        mesh = axes.pcolormesh(grid, cmap="RdBu_r" if signed else "viridis", norm=norm, edgecolors="none")
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(kinds)) + 0.5, list(kinds))
        every = -(-len(layers) // 8)
        axes.set_xticks(np.arange(0, len(layers), every) + 0.5, ["tower" if x < 0 else str(x) for x in layers[::every]])
        axes.tick_params(length=0)
        axes.set(xlabel="layer", title=expert)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if len(layers) <= 8:
            for (y, x), value in np.ndenumerate(grid):
                r, g, b, _ = mesh.cmap(norm(value))
                ink = "#111111" if 0.3 * r + 0.59 * g + 0.11 * b > 0.5 else "#ffffff"
                axes.text(x + 0.5, y + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=ink)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.05)
        bar.outline.set_visible(False)

    return _svg(f"heat-{expert}", 0.85 + 0.27 * len(kinds), draw)


def learning(title: str, curves: Sequence[Mapping[str, Any]]) -> str:
    """Draws greedy validation of a model's trainings by step and by second: one line per seed, one colour per method.

    Args:
        title: of the domain.
        curves: as `tables.summary` has them; `rows` are [step, seconds so far, accuracy, validation or None, KL].
    """
    names = list(dict.fromkeys(curve["method"] for curve in curves))

    def draw(figure: Figure) -> None:
        for axes, at, label in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("step", "second"), strict=True):
            for curve in curves:
                checked = [(0, 0.0, None, curve["base"]), *(row for row in curve["rows"] if row[3] is not None)]
                axes.plot(
                    [row[at] for row in checked], [row[3] for row in checked], marker="o", ms=3, lw=1.3,
                    label=curve["method"], **_series(names.index(curve["method"])),
                )  # fmt: skip
            axes.set(ylim=(-0.03, 1.03), xlabel=label)
            axes.grid(lw=0.5)
        figure.axes[0].set(ylabel="validation accuracy")
        _title(figure, title)
        _legend(figure)

    return _svg(f"learning-{title}", 2.6, draw)


def reliability(bins: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Draws how often each strategy is right against how sure it is: on the diagonal they are equal.

    Args:
        bins: as `dispatched.figures` has them; a point's area grows with the number of its requests.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=LINE, lw=1, zorder=0)
        for color, (name, points) in zip(SERIES, bins.items(), strict=False):
            sure, right = [one["sure"] for one in points], [one["acc"] for one in points]
            axes.plot(sure, right, color=color, lw=1.2)
            axes.scatter(sure, right, [8 + 3 * one["n"] ** 0.5 for one in points], color=color, label=name, alpha=0.8)
        axes.set(xlim=(0, 1.03), ylim=(-0.03, 1.03), xlabel="probability of the label", ylabel="share that is right")
        axes.grid(lw=0.5)
        axes.legend(loc="upper left", fontsize=8)

    return _svg("reliability", 3.2, draw)


def by_numbers(table: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    """Draws the accuracy of a table's first task against the trained numbers, with its interval.

    Args:
        table: as `tables.summary` has it.
        kinds: method -> its line; methods of one kind are joined.
    """
    task = table["tasks"][0]
    rows = [row for row in table["rows"] if row["training"] and task in row["tasks"]]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, kind in enumerate(dict.fromkeys(kinds[row["method"]] for row in rows)):
            mine = [row for row in rows if kinds[row["method"]] == kind]
            mine.sort(key=lambda row: row["training"]["numbers"])
            cells = [row["tasks"][task] for row in mine]
            reach = [[one["acc"] - one["low"] for one in cells], [one["high"] - one["acc"] for one in cells]]
            numbers = [row["training"]["numbers"] for row in mine]
            axes.errorbar(
                numbers, [one["acc"] for one in cells], yerr=reach, marker="o", ms=3.5, lw=1.3, label=kind, **_series(i)
            )
        axes.set(xscale="log", ylim=(-0.03, 1.03), xlabel="trained numbers", ylabel=f"accuracy on {task}")
        axes.grid(lw=0.5)
        _title(figure, table["title"])
        _legend(figure)

    return _svg("numbers", 2.8, draw)


def confusion(title: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    """Draws what pass 1 took the prompts of each task for: tasks down, labels across, "others" last.

    The colours are shares of a task.

    Args:
        counts: task -> label -> number of prompts.
    """
    labels = sorted(dict.fromkeys(label for row in counts.values() for label in row), key=lambda one: one == OTHERS)
    many = len(labels) > 6

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        grid = np.array([[row.get(label, 0) for label in labels] for row in counts.values()], dtype=float)
        shares = grid / grid.sum(1, keepdims=True)
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="none")
        axes.invert_yaxis()
        turned: Any = {"rotation": 90} if many else {"rotation": 30, "ha": "right"}
        axes.set_xticks(np.arange(len(labels)) + 0.5, labels, **turned)
        axes.set_yticks(np.arange(len(counts)) + 0.5, list(counts))
        axes.tick_params(length=0)
        axes.set(xlabel="taken for")
        _title(figure, title)
        for (y, x), share in np.ndenumerate(shares):
            ink = "#ffffff" if share > 0.5 else "#111111"
            size = min(7.5, 60 / len(labels))
            axes.text(x + 0.5, y + 0.5, f"{grid[y, x]:.0f}", ha="center", va="center", fontsize=size, color=ink)

    return _svg(f"confusion-{title}", 1.3 + 0.27 * len(counts) + 0.06 * many * max(map(len, labels)), draw)


def explained(model: str, curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Draws the share of the variance that the r largest singular values hold, one line per kind of matrix.

    Args:
        curves: kind -> [r, share], r rising.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (kind, points) in enumerate(curves.items()):
            ranks, shares = zip(*points, strict=True)
            axes.plot(ranks, shares, marker="o", ms=3, lw=1.2, label=kind, **_series(i))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(ylim=(-0.03, 1.03), xlabel="largest singular values (r)", ylabel="share of variance")
        axes.grid(lw=0.5)
        _title(figure, model)
        _legend(figure)

    return _svg(f"explained-{model}", 2.8, draw)


def by_itself(svg: str) -> str:
    """Returns a figure as a file of its own, with colours that suit a white page."""
    return svg.replace("currentColor", "#1f2328").replace("var(--line)", "#c8ccd0")
