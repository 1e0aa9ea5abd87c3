"""A private endpoint: `t2ray serve` in a process of its own, on a registry that a bench may change.

It starts a Ray of its own and ends it. Not here: the requests to it (`serving`, `soak`).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import t2ray
from benchmarks.endpoint.processes import family
from t2ray.core import ResourceError

PACKAGE = Path(t2ray.__file__).parent
CONFIG = PACKAGE / "serve_config.yaml"
SHIPPED = PACKAGE / "tiny" / "experts"
PROGRAM = [sys.executable, "-c", "import sys; from t2ray.cli.main import main; sys.exit(main())"]
START_S = 180.0
END_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A private endpoint: its address, its registry, and the process that is the ancestor of all its others."""

    url: str
    registry: Path
    pid: int

    def replica(self, deployment: str) -> int:
        """Returns the process id of a deployment's only replica."""
        (pid,) = [pid for pid, title in family(self.pid).items() if title == f"ServeReplica:t2ray:{deployment}"]
        return pid


@contextmanager
def private(
    folder: Path, factors: Path, generator: Mapping[str, Any] | None = None, *, model: str = "tiny",
    experts: Path = SHIPPED,
) -> Iterator[Endpoint]:  # fmt: skip
    """Starts an endpoint in `folder`, with the shipped configuration and a copy of the experts, and ends it.

    Args:
        factors: the model's decomposition.
        generator: options of the deployment `Generator`, in place of its autoscaling.

    Raises:
        ResourceError: the endpoint does not start; the message has the end of its output.
    """
    document = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    registry, config, printed = folder / "experts", folder / "serve_config.yaml", folder / "serve.log"
    shutil.copytree(experts, registry)
    (application,) = document["applications"]
    application["args"] = {"model": model, "factors": str(factors), "experts": str(registry)}
    if generator is not None:
        (deployment,) = [each for each in application["deployments"] if each["name"] == "Generator"]
        del deployment["autoscaling_config"]
        deployment.update(generator)
    config.write_text(yaml.safe_dump(document), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "T2RAY_API_KEYS")}
    with printed.open("w") as log:
        process = subprocess.Popen(
            [*PROGRAM, "serve", "--config", str(config), "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder, env=alone, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,  # so that an interrupt reaches it once, from here
        )  # fmt: skip
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", printed)
        yield Endpoint(url=f"http://127.0.0.1:{port}", registry=registry, pid=process.pid)
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, printed: Path) -> None:
    start = time.monotonic()
    while time.monotonic() - start < START_S and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=20):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    said = " ".join(printed.read_text(encoding="utf-8", errors="replace").split())[-600:]
    why = "not within the time" if process.poll() is None else f"it ended with {process.returncode}"
    raise ResourceError(f"the private endpoint did not start ({why}): {said}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the endpoint as Ctrl-C does, and kills the processes that do not end."""
    processes = family(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        for pid, title in processes.items():
            if family(pid).get(pid) == title:  # another process may have the id by now
                os.kill(pid, signal.SIGKILL)
        process.wait()
