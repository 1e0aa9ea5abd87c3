"""`python -m benchmarks serve` and `soak`: how fast the endpoint is, and whether it lasts.

Both start an endpoint of their own. Not here: the measurements (`serving`, `many`, `soak`).
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.core.command import print_figures
from t2ray.cli.load import print_answers
from t2ray.cli.output import check_json_folder, console, write_json
from t2ray.core import ConfigError
from t2ray.evals.load import Client

SEARCH_S = 45.0


def serve(args: argparse.Namespace) -> None:
    """Prints the figures of a private endpoint, of the tiny model or another, compared with those of the engine alone.

    Raises:
        ConfigError: a model is named without experts, or experts without a model.
    """
    check_json_folder(args.json)
    if (args.model is None) != (args.experts is None):
        raise ConfigError("--model and --experts go together: a model's folder, and a registry of its experts")
    from benchmarks.core.suite import as_json, serve_model
    from benchmarks.core.suite import serve as measured
    from t2ray.models.weights import resolve

    name = "the tiny model" if args.model is None else args.model
    console.print(f"{name}, one thread; a private endpoint and the engine alone; about five minutes")
    if args.model is None:
        results = measured(progress=print_figures)
    else:
        results = serve_model(str(resolve(args.model).absolute()), Path(args.experts).absolute())
        print_figures("throughput", results["throughput"])
    write_json(args.json, as_json(results, threads=1))


def soak(args: argparse.Namespace) -> int:
    """Puts a mixed load on a private endpoint; returns 1 if anything failed."""
    check_json_folder(args.json)
    for name in ("minutes", "rate"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name} is {getattr(args, name):g}; it must be above 0")
    from benchmarks.endpoint.many import expert_file
    from benchmarks.endpoint.private import private
    from t2ray.adapters.factors import decompose

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        factors = folder / "factors"
        decompose("tiny", factors)
        with private(folder, factors) as endpoint:
            console.print(f"{args.minutes:g} minutes of {args.rate:g} requests per second on {endpoint.url}")
            report = asyncio.run(_soaked(endpoint.url, endpoint.pid, expert_file(factors), args))
    _print_soak(report)
    write_json(args.json, report)
    return 1 if report["errors"] else 0


async def _soaked(url: str, pid: int, upload: bytes, args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.endpoint.soak import Soak

    async with Client(url) as client:
        return await Soak(client=client, upload=upload).run(
            rate=args.rate, seconds=60 * args.minutes, search_s=SEARCH_S, root=pid, tell=console.print
        )


def _print_soak(report: dict[str, Any]) -> None:
    visits = ", ".join(f"{count} {kind}" for kind, count in report["visits"].items())
    console.print(f"{visits}; {report['errors']} errors")
    for text, count in report["error_texts"]:
        console.print(f"{count} times: {text}", markup=False)
    print_answers(report["answers"])
    table = Table("process", "pid", "MB", "MB per minute")
    for row in report["processes"]:
        slope = "came or went" if row["mb_a_minute"] is None else f"{row['mb_a_minute']:+.2f}"
        table.add_row(row["title"], str(row["pid"]), f"{row['mb']:.0f}", slope)
    console.print(table)
