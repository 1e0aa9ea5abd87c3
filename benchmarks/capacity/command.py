"""`python -m benchmarks scaling`: the gain of more cores and workers, the time to start, cost models."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from benchmarks.capacity import PARTS
from benchmarks.core.command import print_figures
from t2ray.cli.output import check_json_folder, console, write_json
from t2ray.config.files import nearest
from t2ray.core import ConfigError


def scaling(args: argparse.Namespace) -> None:
    """Runs the named parts, by default all; writes figures, fitted prices and the points they come from."""
    names = args.parts or ([] if args.fleet else list(PARTS))
    for name in names:
        if name not in PARTS:
            raise ConfigError(f"unknown part {name!r} of the bench{nearest(name, PARTS)}")
    check_json_folder(args.json)
    if find_spec("simpy") is None:
        raise ConfigError("the bench of scaling needs simpy; pip install 't2ray[bench]'")
    from benchmarks.capacity.scaling import run

    if names:
        console.print(f"{', '.join(names)}: one to four minutes each, on an otherwise idle machine")
    report = run(names, args.fleet, progress=print_figures)
    write_json(args.json, report)
