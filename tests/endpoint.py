"""A real endpoint for tests: `t2ray serve` as a process of its own, whose replicas are processes that can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import waiting
import yaml
from waiting import GUARD_S, family, lives

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "t2ray" / "tiny" / "experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where it answers, its registry, and its process where it is one of its own."""

    url: str
    registry: Path
    process: subprocess.Popen[str] | None

    def replicas(self, deployment: str) -> list[int]:
        """The process ids of a deployment's replicas (`Proxy` for the HTTP server), of this endpoint alone."""
        assert self.process is not None
        name = "ray::ProxyActor" if deployment == "Proxy" else f"ray::ServeReplica:t2ray:{deployment}"
        return [process.pid for process in family(self.process.pid) if _title(process).startswith(name)]

    def chat(self, content: str, model: str = "t2ray:math", **more: Any) -> httpx.Response:
        """One request."""
        return httpx.post(f"{self.url}/v1/chat/completions", json=body(content, model, **more), timeout=GUARD_S)

    def load(self) -> dict[str, Any]:
        """What the monitor knows."""
        loaded: dict[str, Any] = httpx.get(f"{self.url}/v1/load", timeout=GUARD_S).json()
        return loaded


def body(content: str, model: str = "t2ray:math", **more: Any) -> dict[str, Any]:
    """A greedy chat request."""
    return {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(true: Callable[[], object], what: str) -> None:
    """`waiting.wait_until`, for an endpoint that may not answer yet."""
    waiting.wait_until(true, what, unless=(httpx.HTTPError,))


def write_config(folder: Path, engine: str = "transformers", **generator: Any) -> Path:
    """The shipped `serve_config.yaml` on a registry of its own in `folder`, its generators with changed options."""
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    application = document["applications"][0]
    shutil.copytree(SHIPPED, folder / "experts", dirs_exist_ok=True)
    application["args"] = {"model": "tiny", "experts": str(folder / "experts"), "engine": {"kind": engine}}
    for deployment in application["deployments"]:
        if deployment["name"] == "Generator":
            deployment.update(generator)
            deployment["ray_actor_options"] = {"num_cpus": 0.5}  # two of them fit on two cores
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@contextmanager
def serving(
    folder: Path, *options: str, before: Callable[[], object] = lambda: None, **generator: Any
) -> Iterator[Endpoint]:
    """Runs `t2ray serve` until the block ends, and then sees that nothing of it is left.

    `before` is called when the registry is there and nothing runs.
    """
    port, config = free_port(), write_config(folder, **generator)
    before()
    command = [str(Path(sys.executable).with_name("t2ray")), "serve", "--config", str(config), "--port", str(port)]
    command += options
    quick = {f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1" for who in ("REPLICA", "HANDLE")}
    log = open(folder / "serve.log", "w+")  # noqa: SIM115 (closed below)
    process = subprocess.Popen(
        command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, text=True, env=os.environ | quick
    )
    endpoint = Endpoint(url=f"http://127.0.0.1:{port}", registry=folder / "experts", process=process)
    started: list[psutil.Process] = []
    try:
        wait_until(lambda: process.poll() is not None or "serving on" in Path(log.name).read_text(), "a start")
        assert process.poll() is None, Path(log.name).read_text()
        started = family(process.pid)
        yield endpoint
    finally:
        started += family(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GUARD_S)
        finally:
            process.kill()
            log.close()
        wait_until(lambda: not any(map(lives, started)), "an end of all processes")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
