"""`t2ray serve`: the endpoint of `serve_config.yaml`, on a private Ray of this machine or the cluster of RAY_ADDRESS.

Not here: what the endpoint is made of (`cluster.serve`). Runs until a signal, or until its Ray has died.
"""

from __future__ import annotations

import argparse
import os
import signal
from contextlib import suppress
from pathlib import Path

from t2ray.api.binding import check_host
from t2ray.cli.options import Parser
from t2ray.cli.output import console
from t2ray.config.serve import load
from t2ray.core import ConfigError

PACKAGED = Path(__file__).parents[1] / "serve_config.yaml"
START_S = 600.0


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument(
        "--config",
        metavar="FILE",
        help="A serve_config.yaml; `t2ray config serve` lists the keys of its args. Default: the one that t2ray ships, "
        "for the tiny model.",
    )
    p.add_argument(
        "--host",
        metavar="ADDRESS",
        help="The address to listen on; one that others can reach needs API keys. Default: that of the configuration, "
        "else 127.0.0.1.",
    )
    p.add_argument(
        "--port", type=int, metavar="N", help="The port to listen on. Default: that of the configuration, else 8000."
    )
    p.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="At a signal to end: how long running answers may take to finish, while new requests are refused.",
    )


def run(args: argparse.Namespace) -> None:
    """Deploys, waits until it answers, prints how to ask, and stays."""
    if not args.drain >= 0:
        raise ConfigError(f"--drain is {args.drain:g}; it must be 0 or more seconds")
    document, config = load(args.config or PACKAGED)
    http = document.setdefault("http_options", {})
    http["host"], http["port"] = args.host or http.get("host", "127.0.0.1"), args.port or http.get("port", 8000)
    check_host(http["host"], config.api)

    from t2ray.cluster.serve.app import resolved
    from t2ray.cluster.serve.deploy import CALLBACK, deployed, drain, stay, wait_for_registry
    from t2ray.cluster.serve.traces import traced
    from t2ray.cluster.session import session

    traces = traced(os.environ)
    application, fixed = document["applications"][0], resolved(config)
    application["args"] = fixed.model_dump(mode="json")
    wait_for_registry(str(fixed.experts), console.print)
    os.environ.update(CALLBACK | traces)  # a private Ray's processes inherit it
    with session():
        for number in (signal.SIGTERM, signal.SIGINT):  # Ray's own handlers would end this process at once
            signal.signal(number, signal.default_int_handler)
        with deployed(document, START_S, console.print) as lifeline:
            url = f"http://{_shown(http['host'])}:{http['port']}"
            console.print(f"serving on {url}  (page: {url}/, API: {url}/v1, Ctrl-C ends it)", markup=False)
            try:
                stay(lifeline)
            except KeyboardInterrupt:
                console.print(f"ending: running answers have {args.drain:g} s to finish; a second signal ends at once")
                with suppress(KeyboardInterrupt):
                    finished = drain(application.get("name", "default"), args.drain)
                    console.print("all answers have ended" if finished else "the limit is over: answers end now")


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
