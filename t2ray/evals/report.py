"""A report of measured results: `report.json`, `report.md` and a self-contained `report.html`. No torch.

It lays out the dictionary of `evaluate.build_report` and leaves out tables and figures of what was not measured. Not
here: the figures (`plots.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from t2ray.evals import plots
from t2ray.evals.answers import baseline_cells
from t2ray.experts.heatmap import HeatMap

METHODS = {
    "base": "base", "expert": "own expert", "oracle": "best expert", "prompt": "prompt", "cls": "cls",
    "fewshot": "few-shot",
}  # fmt: skip
BASELINES = ("majority", "random")
TABLES = {"trained": "Trained tasks", "unseen": "Unseen tasks"}
NOTES = {
    "accuracy": "Accuracy in %, with the 95 % Wilson interval. Own expert: the task's, or its trained sibling's. Best "
    "expert: the best of the base and all experts on these very prompts (an oracle).",
    "baselines": "Majority: the accuracy of one and the same answer to everything, the commonest right one. Random: "
    "that of a random choice, where there are choices.",
    "readings": "What the verifier took the answers to be, and how often; ... stands for all others. First come the "
    "right answers.",
    "confusion": "One row per task, one column per label that pass 1 chose (number of prompts).",
    "mixtures": "The weight of each expert that the few-shot search found for a task; the base holds the rest.",
    "curves": "Accuracy of the sampled rollouts, greedy validation, and KL to the base model.",
    "shifts": "How far each expert moved the singular values: z - 1, by matrix and layer.",
}


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    shifts: Mapping[str, HeatMap],
) -> None:
    """Writes report.json, report.md and report.html into `folder`, and makes the folder if it is missing.

    Args:
        report: as from `evaluate.build_report`.
        curves: domain -> the rows of its metrics.jsonl (`step`, `accuracy`, `kl`, in some rows `validation`).
        shifts: expert -> the mean of z - 1 per layer and kind of matrix, as from `experts.heatmap.mean_shift`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = html_page(report, curves, shifts)
    (folder / "report.html").write_text(page, encoding="utf-8")
    text = f"# t2ray report\n\n{_summary(report)}\n\n{text_tables(report)}\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def text_tables(report: Mapping[str, Any]) -> str:
    """Returns all tables as aligned Markdown, which is readable on a terminal too."""
    parts: list[str] = []
    for kind, title in TABLES.items():
        if table := report["tables"].get(kind):
            names = _methods(table)
            rows = [
                [
                    task,
                    _n(row),
                    *baseline_cells(report.get("baselines", {}).get(task, {})),
                    *(_text_cell(row[name]) if name in row else "" for name in names),
                ]
                for task, row in table.items()
            ]
            head = ["task", "n", *BASELINES, *(METHODS[name] for name in names)]
            parts += [f"## {title}", f"{NOTES['accuracy']} {NOTES['baselines']}", _table(head, rows)]
    parts += [f"Warning: {line}." for line in report.get("warnings", ())]
    for task, (readings, counts) in _readings(report).items():
        rows = [[name, *(str(row.get(reading, 0)) for reading in readings)] for name, row in counts.items()]
        parts += [f"## Answers to {task}", NOTES["readings"], _table(["", *readings], rows)]
    if classifier := report["classifier"]:
        cells = [_text_cell(classifier[name]) for name in ("base", "expert")]
        parts += [
            "## The classification task",
            _table(["task", "n", "base", "own expert"], [["dispatch", _n(classifier), *cells]]),
        ]
    for name, matrix in report["confusion"].items():
        labels = list(next(iter(matrix.values())))
        rows = [[task, *(str(row[label]) for label in labels)] for task, row in matrix.items()]
        parts += [f"## Dispatcher: {name}", NOTES["confusion"], _table(["task", *labels], rows)]
    if mixtures := report["mixtures"]:
        experts = list(next(iter(mixtures.values())))
        rows = [[task, *(_alpha(row[name]) for name in experts)] for task, row in mixtures.items()]
        parts += ["## Few-shot mixtures", NOTES["mixtures"], _table(["task", *experts], rows)]
    if targets := report["targets"]:
        rows = [[t["name"], f"{t['target']:.3f}", f"{t['value']:.3f}", "yes" if t["met"] else "NO"] for t in targets]
        parts += ["## Targets", _table(["target", "needed", "measured", "reached"], rows)]
    timing = [[stage, f"{seconds:.1f}"] for stage, seconds in report["timing_s"].items()]
    parts += ["## Seconds of every stage", _table(["stage", "seconds"], timing)]
    return "\n\n".join(parts)


def html_page(
    report: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    shifts: Mapping[str, HeatMap],
) -> str:
    """Returns the report as one HTML page without any reference to another file or host."""
    sections = [_accuracy(report), _targets(report), _answers(report), _confusion(report)]
    if report["mixtures"]:
        figures = {"alpha by task and expert": plots.alphas(report["mixtures"])}
        sections.append(_figures("Few-shot mixtures", NOTES["mixtures"], figures))
    drawn = {f"learning curve of {domain}": plots.curves(domain, rows) for domain, rows in curves.items() if rows}
    sections.append(_figures("Learning curves", NOTES["curves"], drawn))
    limit = max((abs(v) for heat in shifts.values() for row in heat.values for v in row), default=0.0) or 1.0
    drawn = {f"z - 1 of {expert}": plots.heat_map(expert, heat, limit) for expert, heat in shifts.items()}
    sections.append(_figures("What the experts changed", NOTES["shifts"], drawn))
    template = Template(resources.files("t2ray.evals").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(summary=escape(_summary(report)), sections="\n".join(sections))


def _accuracy(report: Mapping[str, Any]) -> str:
    note = escape(f"{NOTES['accuracy']} {NOTES['baselines']}")
    lines = "".join(f'<p class="bad">{escape(line)}.</p>' for line in report.get("warnings", ()))
    parts = [f"<h2>Accuracy</h2><p>{note}</p>{lines}", '<div class="pair">']
    for kind, title in TABLES.items():
        if table := report["tables"].get(kind):
            names = _methods(table)
            rows = [
                [
                    f"{_name(task)}<small>n {_n(row)}</small>",
                    *map(escape, baseline_cells(report.get("baselines", {}).get(task, {}))),
                    *(_html_cell(row.get(name)) for name in names),
                ]
                for task, row in table.items()
            ]
            head = ["task", *BASELINES, *(METHODS[name] for name in names)]
            parts.append(f"<section><h3>{title}</h3>{_html_table(head, rows)}</section>")
    return "".join([*parts, "</div>"])


def _answers(report: Mapping[str, Any]) -> str:
    sections = [
        f"<section><h3>{_name(task)}</h3>{_shares(readings, counts)}</section>"
        for task, (readings, counts) in _readings(report).items()
    ]
    note = f"<h2>Answers</h2><p>{escape(NOTES['readings'])}</p>"
    return f'{note}<div class="pair">{"".join(sections)}</div>' if sections else ""


def _readings(report: Mapping[str, Any]) -> dict[str, tuple[list[str], dict[str, Mapping[str, int]]]]:
    """Returns task -> its readings, and how often each strategy gave which; of tasks with few right answers alone."""
    found: dict[str, tuple[list[str], dict[str, Mapping[str, int]]]] = {}
    for task, baseline in report.get("baselines", {}).items():
        golds, answered = baseline["golds"], report["details"].get(task, {})
        if not golds or "..." in golds or not any(row.get("readings") for row in answered.values()):
            continue
        counts = {"right": golds} | {name: row["readings"] for name, row in answered.items()}
        others = {reading for row in counts.values() for reading in row} - {*golds, "..."}
        rest: dict[str, Mapping[str, int]] = {
            name: {reading: row.get(reading, 0) for reading in golds}
            | {"...": sum(row.values()) - sum(row.get(reading, 0) for reading in golds)}
            for name, row in counts.items()
        }
        found[task] = ([*sorted(golds), *(["..."] if others else [])], rest)
    return found


def _confusion(report: Mapping[str, Any]) -> str:
    if not report["confusion"]:
        return ""
    parts = [f"<h2>Dispatcher</h2><p>{escape(NOTES['confusion'])}</p>", '<div class="pair">']
    if classifier := report["classifier"]:
        row = [
            f"dispatch<small>n {_n(classifier)}</small>",
            *(_html_cell(classifier[name]) for name in ("base", "expert")),
        ]
        table = _html_table(["task", "base", "own expert"], [row])
        parts.append(f"<section><h3>The classification task</h3>{table}</section>")
    for name, matrix in report["confusion"].items():
        parts.append(f"<section><h3>{escape(name)}</h3>{_shares(list(next(iter(matrix.values()))), matrix)}</section>")
    return "".join([*parts, "</div>"])


def _shares(labels: Sequence[str], matrix: Mapping[str, Mapping[str, int]]) -> str:
    """Returns a table of counts, each shaded by its share of its row."""
    head = "".join(f"<th>{escape(x)}</th>" for x in ["", *labels])
    body = ""
    for name, row in matrix.items():
        total = sum(row.values()) or 1
        cells = (f'<td class="share" style="--p:{row[x] / total:.3f}">{row[x]}</td>' for x in labels)
        body += f"<tr><td>{_name(name)}</td>{''.join(cells)}</tr>"
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _targets(report: Mapping[str, Any]) -> str:
    rows = []
    for t in report["targets"]:
        mark = '<span class="good">yes</span>' if t["met"] else '<span class="bad">no</span>'
        rows.append([escape(t["name"]), f"{t['target']:.3f}", f"{t['value']:.3f}", mark])
    targets = _html_table(["target", "needed", "measured", "reached"], rows)
    timing = _html_table(["stage", "seconds"], [[escape(k), f"{v:.1f}"] for k, v in report["timing_s"].items()])
    first = f"<section><h2>Targets</h2>{targets}</section>" if rows else ""
    return f'<div class="pair">{first}<section><h2>Seconds of every stage</h2>{timing}</section></div>'


def _figures(title: str, note: str, drawn: Mapping[str, str]) -> str:
    if not drawn:
        return ""
    figures = "".join(
        f'<figure role="img" aria-label="{escape(label, quote=True)}">{svg}</figure>' for label, svg in drawn.items()
    )
    return f'<h2>{escape(title)}</h2><p>{escape(note)}</p><div class="figures">{figures}</div>'


def _summary(report: Mapping[str, Any]) -> str:
    met = sum(t["met"] for t in report["targets"])
    machine = report["machine"]
    if isinstance(machine, Mapping):
        machine = ", ".join(f"{key} {value}" for key, value in machine.items())
    share = report["pass1_share"]
    parts = [
        f"{met} of {len(report['targets'])} targets reached.",
        "" if share is None else f"Pass 1 takes {share:.1%} of the time of pass 2 (64 new tokens).",
        f"Seed {report['seed']}; machine: {machine}.",
    ]
    return " ".join(part for part in parts if part)


def _name(task: str) -> str:
    """Escapes a name and lets it break after each underscore, so that a table fits on a phone."""
    return escape(task).replace("_", "_<wbr>")


def _methods(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [name for name in METHODS if any(name in row for row in table.values())]


def _n(row: Mapping[str, Any]) -> str:
    return "/".join(str(n) for n in sorted({cell["n"] for cell in row.values()}))


def _text_cell(cell: Mapping[str, Any]) -> str:
    low, high = cell["ci95"]
    return f"{100 * cell['acc']:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def _html_cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    low, high = cell["ci95"]
    return f"{100 * cell['acc']:.1f}<small>{100 * low:.0f}&ndash;{100 * high:.0f}</small>"


def _alpha(weight: float | Sequence[float]) -> str:
    return "/".join(f"{w:.2f}" for w in weight) if isinstance(weight, Sequence) else f"{weight:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *rest])} |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(x)}</th>" for x in head)
    body = "".join(f"<tr>{''.join(f'<td>{x}</td>' for x in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'
