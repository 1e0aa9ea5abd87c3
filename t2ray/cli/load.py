"""`t2ray load` asks a running endpoint at random times, however fast it answers, and prints how long answers took.

Not here: the client and its figures (`t2ray.evals.load`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

from rich.table import Table

from t2ray.cli.options import Parser, add_json
from t2ray.cli.output import check_json_folder, console, write_json
from t2ray.core import ConfigError


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument("url", metavar="URL", help="The address of the endpoint, such as http://127.0.0.1:8000.")
    p.add_argument("--rate", type=float, required=True, metavar="R", help="How many requests per second, on average.")
    p.add_argument("--seconds", type=float, default=30.0, metavar="S", help="For how many seconds requests are sent.")
    p.add_argument("--model", default="t2ray", metavar="MODEL", help="The model name that is asked for.")
    p.add_argument(
        "--stream", action="store_true", help="Ask for answers as streams, so that first tokens are timed too."
    )
    p.add_argument("--key", metavar="VARIABLE", help="The environment variable that holds the API key.")
    p.add_argument(
        "--prompt", default="{n}+17", metavar="TEXT", help='The prompt, in which "{n}" is the number of the request.'
    )
    p.add_argument("--max-tokens", type=int, default=64, metavar="N", help="The greatest number of tokens per answer.")
    p.add_argument(
        "--ignore-eos", action="store_true", help="Let every answer have that many tokens; t2ray and vLLM accept this."
    )
    add_json(p)


def run(args: argparse.Namespace) -> int:
    """Asks an endpoint at random times; returns 1 if a request failed."""
    check_json_folder(args.json)
    for name in ("rate", "seconds", "max_tokens"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name):g}; it must be above 0")
    if args.key and not os.environ.get(args.key):
        raise ConfigError(f"--key {args.key}: no such environment variable, or it is empty; put the API key into it")
    if not args.url.startswith(("http://", "https://")):
        raise ConfigError(f"{args.url!r} is no address of an endpoint; write http://HOST:PORT")
    from t2ray.evals.load import summary

    report = summary(asyncio.run(_asked(args)))
    print_answers(report)
    write_json(args.json, report)
    return 1 if report["errors"] or not report["answered"] else 0


async def _asked(args: argparse.Namespace) -> list[Any]:
    from t2ray.evals.load import Client, Outcome, chat, open_loop

    url = args.url.rstrip("/").removesuffix("/v1")
    async with Client(url, os.environ[args.key] if args.key else None) as client:

        async def send(number: int, due: float) -> Outcome:
            content = args.prompt.replace("{n}", str(number))
            body = chat(
                content, args.model, max_tokens=args.max_tokens, stream=args.stream, ignore_eos=args.ignore_eos
            )  # fmt: skip
            return await client.ask(body, due=due)

        return await open_loop(send, args.rate, args.seconds)


def print_answers(report: dict[str, Any]) -> None:
    """Prints a report of `evals.load.summary`: rates, times and errors."""
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
