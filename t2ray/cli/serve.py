"""`t2ray serve` runs an endpoint, on a private Ray of this machine or on the cluster of RAY_ADDRESS.

It runs until a signal, or until its Ray has died. Not here: what the endpoint is made of (`cluster.serve`).
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
from t2ray.config.files import expanded
from t2ray.config.serve import ServeConfig, load
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
    p.add_argument("--run", metavar="FOLDER", help="The folder of a training run, whose model and experts are served.")
    p.add_argument(
        "--model",
        metavar="MODEL",
        help='The model: "tiny", "tiny-vision", a local Hugging Face folder or a hub id. Default: see --config.',
    )
    p.add_argument(
        "--experts", metavar="URI", help="The registry of experts: a folder, s3:// or gs://. Default: see --config."
    )
    p.add_argument("--factors", metavar="DIR", help="The folder of the model's decomposition. Default: see --config.")
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
    """Deploys the endpoint, waits until it answers, prints how to ask it, and stays."""
    if not 0 <= args.drain < float("inf"):
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
    application, fixed = document["applications"][0], resolved(_served(config, args))
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


def _served(config: ServeConfig, args: argparse.Namespace) -> ServeConfig:
    """Returns the configuration with what the options name; another model has other experts and other factors."""
    named = {key: expanded(value) for key in ("model", "experts", "factors") if (value := getattr(args, key))}
    if args.run is None and args.model is None:
        return config.model_copy(update=named)
    other: dict[str, str | None] = {"name": None, "experts": None, "factors": None}
    if args.run is not None:
        from t2ray.workbench import find_place

        place = find_place(expanded(args.run))
        if args.model is not None and place.model not in (named["model"], str(Path(named["model"]).absolute())):
            raise ConfigError(f"the run {args.run} brings its own model; leave out --model {args.model} or --run")
        other |= {"model": place.model, "experts": place.experts, "factors": place.factors}
    return config.model_copy(update=other | named)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
