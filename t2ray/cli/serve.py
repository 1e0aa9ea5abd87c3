"""`t2ray serve`: the endpoint of `serve_config.yaml`, on a private Ray of this machine or the cluster of RAY_ADDRESS.

Not here: what the endpoint is made of (`cluster.serve`). Runs until Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from t2ray.api.binding import check_host
from t2ray.cli.output import console
from t2ray.config.files import read_yaml, validate
from t2ray.config.serve import ServeConfig
from t2ray.core import ConfigError

PACKAGED = Path(__file__).parents[1] / "serve_config.yaml"
START_S = 600.0


def serve(args: argparse.Namespace) -> None:
    """Deploys, waits until it answers, prints how to ask, and stays."""
    document = read_yaml(Path(args.config or PACKAGED))
    application = _application(document)
    http = document.setdefault("http_options", {})
    http["host"], http["port"] = args.host or http.get("host", "127.0.0.1"), args.port or http.get("port", 8000)
    config = validate(ServeConfig, application.get("args") or {}, where="args")
    check_host(http["host"], config.api)

    from t2ray.cluster.serve.app import resolved
    from t2ray.cluster.serve.deploy import deployed
    from t2ray.cluster.session import session

    application["args"] = resolved(config).model_dump(mode="json")
    with session():
        for number in (signal.SIGTERM, signal.SIGINT):  # Ray's own handlers would end this process at once
            signal.signal(number, signal.default_int_handler)
        with deployed(document, START_S, console.print):
            url = f"http://{_shown(http['host'])}:{http['port']}"
            console.print(f"serving on {url}  (page: {url}/, API: {url}/v1, Ctrl-C ends it)", markup=False)
            with suppress(KeyboardInterrupt):
                signal.pause()
            console.print("ending: what is being answered may finish")


def _application(document: dict[str, Any]) -> dict[str, Any]:
    applications = document.get("applications")
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError("the configuration needs exactly one entry in `applications`; see serve_config.yaml")
    application: dict[str, Any] = applications[0]
    return application


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
