"""`python -m benchmarks`: prints the core's speed as ratios, and may write them as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from rich.table import Table

from benchmarks.core import record
from benchmarks.core.shape import BenchShape
from benchmarks.core.suite import BENCHES, as_json, run
from benchmarks.harness import Figures, Measure
from t2ray.cli.output import check_json_folder, console, write_json
from t2ray.config.files import nearest
from t2ray.core import ConfigError

LEAST_REPEATS = 5


def core(args: argparse.Namespace) -> int:
    """Runs the named benches, by default all; each figure is a median of interleaved rounds.

    Returns:
        1 if a quick run falls behind the record, else 0.
    """
    if args.quick:
        return _quick(args)
    names = args.benches or list(BENCHES)
    for name in names:
        if name not in BENCHES:
            raise ConfigError(f"unknown bench {name!r}{nearest(name, BENCHES)}")
    if args.repeats < LEAST_REPEATS:
        raise ConfigError(f"--repeats is {args.repeats}; a median with its spread needs at least {LEAST_REPEATS}")
    if args.threads < 1:
        raise ConfigError(f"--threads is {args.threads}; it must be at least 1")
    check_json_folder(args.json)
    _run(names, BenchShape(), args.repeats, args)
    return 0


def _quick(args: argparse.Namespace) -> int:
    """Measures a smaller model in fewer rounds, and writes the figures or holds them against the record."""
    if args.benches:
        raise ConfigError(f"--quick runs {', '.join(record.BENCHES)} and takes no names, not {args.benches[0]!r}")
    check_json_folder(args.json)
    recorded = None if args.json else record.read()
    results = _run(record.BENCHES, record.SHAPE, record.REPEATS, args)
    lines = [] if recorded is None else record.behind(results, recorded)
    for line in lines:
        console.print(line, style="bold")
    if recorded is not None and not lines:
        console.print(f"no ratio is worse than the record of {recorded['date']} by more than {record.TOLERANCE} times")
    return int(bool(lines))


def _run(names: Sequence[str], shape: BenchShape, repeats: int, args: argparse.Namespace) -> Mapping[str, Figures]:
    console.print(
        f"Llama of {shape.layers} layers x {shape.width}, random weights, {args.threads} thread(s); "
        f"medians of {repeats} rounds, lowest and highest in brackets"
    )
    results = run(names, shape=shape, repeats=repeats, threads=args.threads, progress=print_figures)
    write_json(args.json, as_json(results, args.threads))
    return results


def print_figures(name: str, figures: Figures) -> None:
    """Prints the figures of one bench as a table."""
    table = Table("measure", "value", "spread", "target", "", title=name, title_justify="left")
    for key, figure in figures.items():
        if not isinstance(figure, Measure):
            table.add_row(key, "-", "", "", f"skipped: {figure.reason}")
            continue
        sign = "<=" if figure.at_most else ">="
        target = "" if figure.target is None else f"{sign} {figure.target:g}"
        verdict = {None: "", True: "met", False: "missed"}[figure.met]
        table.add_row(key, f"{figure.value:.3g}", f"[{figure.low:.3g}, {figure.high:.3g}]", target, verdict)
    console.print(table)
