"""`t2ray bench serve`, `bench load` and `bench soak`: how fast the endpoint is, and how long it lasts.

The first and the last start an endpoint of their own; `bench load` asks one that runs. Not here: what is measured
(`t2ray.bench`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

from t2ray.bench.load import Client, Outcome, chat, open_loop, summary
from t2ray.commands.bench import print_figures
from t2ray.commands.terminal import console
from t2ray.core import ConfigError

SEARCH_S = 45.0


def serve(args: argparse.Namespace) -> None:
    """The figures of a private endpoint on the tiny model, beside those of the engine alone."""
    _check_folder(args.json)
    from t2ray.bench.suite import as_json
    from t2ray.bench.suite import serve as measured

    console.print("the tiny model, one thread; a private endpoint and the engine alone; about five minutes")
    results = measured(progress=print_figures)
    _write(args.json, as_json(results, threads=1))


def load(args: argparse.Namespace) -> int:
    """Asks an endpoint at random times; 1 when a request failed."""
    _check_folder(args.json)
    for name in ("rate", "seconds", "max_tokens"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name):g}; it must be above 0")
    if args.key and not os.environ.get(args.key):
        raise ConfigError(f"--key {args.key}: no such environment variable, or it is empty; put the API key into it")
    if not args.url.startswith(("http://", "https://")):
        raise ConfigError(f"{args.url!r} is no address of an endpoint; write http://HOST:PORT")
    url = args.url.rstrip("/").removesuffix("/v1")
    key = os.environ[args.key] if args.key else None
    report = summary(asyncio.run(_asked(url, key, args)))
    _print_load(report)
    _write(args.json, report)
    return 1 if report["errors"] or not report["answered"] else 0


async def _asked(url: str, key: str | None, args: argparse.Namespace) -> list[Outcome]:
    async with Client(url, key) as client:

        async def send(number: int, due: float) -> Outcome:
            content = args.prompt.replace("{n}", str(number))
            body = chat(
                content, args.model, max_tokens=args.max_tokens, stream=args.stream, ignore_eos=args.ignore_eos
            )  # fmt: skip
            return await client.ask(body, due=due)

        return await open_loop(send, args.rate, args.seconds)


def soak(args: argparse.Namespace) -> int:
    """A mixed load on a private endpoint; 1 when anything failed."""
    _check_folder(args.json)
    for name in ("minutes", "rate"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name} is {getattr(args, name):g}; it must be above 0")
    from t2ray.bench.endpoint import private
    from t2ray.bench.many import expert_file
    from t2ray.svd import decompose

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        factors = folder / "factors"
        decompose("tiny", factors)
        with private(folder, factors) as endpoint:
            console.print(f"{args.minutes:g} minutes of {args.rate:g} requests a second on {endpoint.url}")
            report = asyncio.run(_soaked(endpoint.url, endpoint.pid, expert_file(factors), args))
    _print_soak(report)
    _write(args.json, report)
    return 1 if report["errors"] else 0


async def _soaked(url: str, pid: int, upload: bytes, args: argparse.Namespace) -> dict[str, Any]:
    from t2ray.bench.soak import Soak

    async with Client(url) as client:
        return await Soak(client=client, upload=upload).run(
            rate=args.rate, seconds=60 * args.minutes, search_s=SEARCH_S, root=pid, tell=console.print
        )


def _print_load(report: dict[str, Any]) -> None:
    console.print(
        f"{report['answered']} of {report['requests']} requests answered in {report['seconds']:.1f} s: "
        f"{report['requests_per_s']:.2f} requests/s, {report['tokens_per_s']:.1f} tokens/s"
    )
    table = Table("ms", "p50", "p90", "p99")
    for name in ("ttft_ms", "tpot_ms", "latency_ms"):
        if name in report:
            table.add_row(name.removesuffix("_ms"), *(f"{value:.1f}" for value in report[name].values()))
    if table.rows:
        console.print(table)
    for kind, count in report["errors"].items():
        console.print(f"{count} errors: {kind}", markup=False)
    if report["errors"]:
        console.print(f"the first: {report['first_error']}", markup=False)


def _print_soak(report: dict[str, Any]) -> None:
    visits = ", ".join(f"{count} {kind}" for kind, count in report["visits"].items())
    console.print(f"{visits}; {report['errors']} errors")
    for text, count in report["error_texts"]:
        console.print(f"{count} times: {text}", markup=False)
    _print_load(report["answers"])
    table = Table("process", "pid", "MB", "MB a minute")
    for row in report["processes"]:
        slope = "came or went" if row["mb_a_minute"] is None else f"{row['mb_a_minute']:+.2f}"
        table.add_row(row["title"], str(row["pid"]), f"{row['mb']:.0f}", slope)
    console.print(table)


def _check_folder(path: str | None) -> None:
    """Before minutes of work, not after."""
    if path and not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--json {path}: no such folder; make it first")


def _write(path: str | None, report: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
