"""`python -m benchmarks`: prints the core's speed as ratios, and may write them as JSON."""

from __future__ import annotations

import argparse

from rich.table import Table

from benchmarks.core.shape import BenchShape
from benchmarks.core.suite import BENCHES, as_json, run
from benchmarks.harness import Figures, Measure
from t2ray.cli.output import check_json_folder, console, write_json
from t2ray.config.files import nearest
from t2ray.core import ConfigError

LEAST_REPEATS = 5


def core(args: argparse.Namespace) -> None:
    """Runs the named benches, by default all; each figure is a median of interleaved rounds."""
    names = args.benches or list(BENCHES)
    for name in names:
        if name not in BENCHES:
            raise ConfigError(f"unknown bench {name!r}{nearest(name, BENCHES)}")
    if args.repeats < LEAST_REPEATS:
        raise ConfigError(f"--repeats is {args.repeats}; a median with its spread needs at least {LEAST_REPEATS}")
    if args.threads < 1:
        raise ConfigError(f"--threads is {args.threads}; it must be at least 1")
    check_json_folder(args.json)
    shape = BenchShape()
    console.print(
        f"Llama of {shape.layers} layers x {shape.width}, random weights, {args.threads} thread(s); "
        f"medians of {args.repeats} rounds, lowest and highest in brackets"
    )
    results = run(names, shape=shape, repeats=args.repeats, threads=args.threads, progress=print_figures)
    write_json(args.json, as_json(results, args.threads))


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
