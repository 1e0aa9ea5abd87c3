"""`t2ray bench scaling`: gains of cores and workers, starting up, cost models; not here: how they are measured."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from t2ray.commands.bench import print_figures
from t2ray.commands.bench_options import SCALING
from t2ray.commands.terminal import console
from t2ray.config import nearest
from t2ray.core import ConfigError


def scaling(args: argparse.Namespace) -> None:
    """Runs the named parts, all of them when none is; writes figures, fitted prices and their points."""
    names = args.parts or ([] if args.fleet else list(SCALING))
    for name in names:
        if name not in SCALING:
            raise ConfigError(f"unknown part {name!r} of the bench{nearest(name, SCALING)}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ConfigError(f"--json {args.json}: no such folder; make it first")
    if find_spec("simpy") is None:
        raise ConfigError("bench scaling needs simpy; pip install 't2ray[bench]'")
    from t2ray.bench.scaling import run

    if names:
        console.print(f"{', '.join(names)}: one to four minutes each, on an otherwise idle machine")
    report = run(names, args.fleet, progress=print_figures)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
