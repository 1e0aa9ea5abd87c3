"""Attaching to a Ray cluster, or starting a private one on this machine, and saying in time what will not work.

Every complaint comes within seconds; left to Ray, a wrong address takes more than a minute and a wrong token 20 s.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import grpc
import ray
from ray._private import ray_constants
from ray._private import utils as ray_utils
from ray._private.grpc_utils import init_grpc_channel
from ray._private.state import state
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from t2ray.core import ConfigError, ResourceError
from t2ray.store import Store

PRIVATE = "t2ray_private"
"""A resource that only a Ray has that `session` started: its own processes, too, see that the cluster is private."""

_KNOCK_S = 5.0
_PROBE_S = 8.0
_JOB_FOLDER = "runtime_resources/working_dir_files"
_TOKEN_REMEDY = (
    "the cluster's token is in ~/.ray/auth_token of the machine that started it: copy it to the same place here, or "
    "name it by RAY_AUTH_TOKEN_PATH"
)


@contextmanager
def session(num_cpus: int | None = None) -> Iterator[dict[str, float]]:
    """Yields what a cluster has, or may grow to: the connected one, `RAY_ADDRESS`'s, or a private one for the block.

    What a private one has includes `PRIVATE`, so that whoever uses it knows it from a cluster that was there.

    Raises:
        ResourceError: nobody listens there, the token is missing or wrong, or the cluster's Ray or Python differs.
    """
    if ray.is_initialized():
        yield _resources()
        return
    try:
        _join(num_cpus)
        yield _resources()
    finally:  # of a Ray that refuses or comes too late, too, a part is there
        ray.shutdown()


def _join(num_cpus: int | None) -> None:
    """Connects with `RAY_ADDRESS`'s cluster or starts a private one; raises as `session`."""
    # "local": without an address Ray would join whatever cluster was started on this machine last.
    address = os.environ.get("RAY_ADDRESS") or "local"
    private = {"num_cpus": num_cpus, "include_dashboard": False, "resources": {PRIVATE: 1}}
    try:
        if re.fullmatch(r"[^/]+:\d+", address):
            _knock(address)
        more = private if address == "local" else {}
        with _sigterm_later(), _on_the_loopback() if more else nullcontext():
            ray.init(address=address, log_to_driver=False, logging_level="error", **more)
    except AuthenticationError:
        raise ResourceError(f"no token for the Ray cluster at {address}; {_TOKEN_REMEDY}") from None
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise ResourceError(f"{_versions(str(error))}; install the cluster's versions here, or submit a job") from None
    except ConnectionError as error:
        raise ResourceError(f"RAY_ADDRESS={address}: {error}; is the cluster up?") from None
    except Exception as error:  # Ray says it by no narrower class
        if "timed out during startup" not in str(error):
            raise
        raise ResourceError(
            "Ray did not come up within its 30 seconds, as on a busy machine; try again, or start a cluster by "
            "`ray start --head` and name it in RAY_ADDRESS"
        ) from None


@contextmanager
def _on_the_loopback() -> Iterator[None]:
    """Has a Ray that starts in the block take 127.0.0.1 for its node, so that none of its ports is open to others.

    Elsewhere than on Linux that is what Ray does by itself. Its metrics agent asks for no token.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _sigterm_later() -> Iterator[None]:
    """Holds SIGTERM back while Ray starts, and keeps the handler that this process has.

    Ray sets one that raises SystemExit, which its start may swallow, and which makes another exit code of it.
    """
    before = signal.getsignal(signal.SIGTERM)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    rays, ray_utils.set_sigterm_handler = ray_utils.set_sigterm_handler, lambda handler: None
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = rays
        signal.signal(signal.SIGTERM, before)
        if came:
            before(signal.SIGTERM, None)


def slots(need: Mapping[str, float], have: Mapping[str, float], what: str) -> int:
    """How many times `need` fits into a cluster that has `have`.

    Raises:
        ResourceError: not once: "needs X, the cluster has Y".
    """
    lacking = {key: amount for key, amount in need.items() if amount > have.get(key, 0.0)}
    if lacking:
        needs = ", ".join(f"{amount:g} {key}" for key, amount in lacking.items())
        has = ", ".join(f"{have.get(key, 0.0):g} {key}" for key in lacking)
        raise ResourceError(f"{what} needs {needs}, the cluster has {has}; lower workers, cpus or gpus, or add nodes")
    return int(min(have[key] // amount for key, amount in need.items() if amount > 0))


def cancel(tasks: Sequence[ray.ObjectRef]) -> None:
    """Interrupts those tasks that still run, and leaves alone those that have ended.

    Ray aborts this process where a task is cancelled whose result is there and whose end Ray has not noted yet
    (ray#54260). So no task is cancelled that may just have been waited for.
    """
    _, running = ray.wait(tasks, num_returns=len(tasks), timeout=0) if tasks else ([], [])
    for task in running:
        ray.cancel(task)


def check_shared(folders: Sequence[str]) -> None:
    """Whether every node sees what the driver writes into `folders`; a URI is shared by its nature.

    A file is written into each local folder and looked for on every node of a cluster of several; it is deleted again,
    and so are the folders that it needed. Nodes that join later look for the run's own `config.json`.

    Raises:
        ConfigError: as `check_lasting`.
        ResourceError: a node that does not see the file, and which.
    """
    check_lasting(folders)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1:
        for folder in folders:
            if "://" not in folder:
                _probe(folder, nodes)


def check_lasting(folders: Sequence[str]) -> None:
    """Refuses to write into a submitted job's own working folder, which Ray deletes.

    Raises:
        ConfigError: with the folder's name as the user wrote it.
    """
    for folder in folders:
        if _JOB_FOLDER in folder:
            name = folder.split(_JOB_FOLDER)[1].partition("/")[2].partition("/")[2]
            raise ConfigError(
                f"{name!r} is a folder of the submitted job, which Ray deletes; name one that all nodes share by its "
                "whole path, or s3:// or gs://"
            )


def _probe(folder: str, nodes: Sequence[Mapping[str, str]]) -> None:
    made = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    probe = f"probe-{uuid.uuid4().hex}"
    Store(folder).write_text(probe, "")
    try:
        sees = {
            ray.remote(num_cpus=0, max_retries=0)(os.path.exists)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote(f"{folder}/{probe}"): node["NodeManagerAddress"]
            for node in nodes
        }
        answered, _ = ray.wait(list(sees), num_returns=len(sees), timeout=_PROBE_S)
        blind = sorted(sees[task] for task in answered if not _answer(task))
    finally:
        Store(folder).delete(probe)
        for path in made:
            path.rmdir()
    if blind:
        raise ResourceError(
            f"{folder} is not shared: a file that was written here is not seen on {', '.join(blind)}; name a folder "
            "that all nodes mount, or s3:// or gs://"
        )


def _answer(task: ray.ObjectRef) -> bool:
    """What a node saw; one that died or cannot answer is found out by whoever uses it."""
    try:
        return bool(ray.get(task, timeout=0))
    except (RayError, GetTimeoutError):
        return True


def _resources() -> dict[str, float]:
    """What the cluster has and, where nodes come on demand, the most that its configuration lets it have."""
    most = state.get_max_resources_from_cluster_config() or {}
    now = ray.cluster_resources()
    return {key: max(float(now.get(key, 0.0)), float(most.get(key, 0.0))) for key in {**now, **most}}


def _knock(address: str) -> None:
    """Asks the cluster for its id: the smallest question that needs a token."""
    try:
        with init_grpc_channel(address) as channel:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=_KNOCK_S)
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise ResourceError(f"the Ray cluster at {address} refuses the token; {_TOKEN_REMEDY}") from None
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise ResourceError(
                f"no Ray cluster answers at RAY_ADDRESS={address}; start it by `ray start --head`, or unset RAY_ADDRESS"
            ) from None
        # Whatever else it says, somebody listens: Ray's own connection tells more.


def _versions(message: str) -> str:
    """`the cluster runs Ray 2.59.0 and Python 3.12.1, this is Ray 2.60.0 and Python 3.11.7`."""
    rays, pythons = (re.findall(rf"{what}: (\S+)", message) for what in ("Ray", "Python"))
    if len(rays) < 2 or len(pythons) < 2:
        return " ".join(message.split())
    return f"the cluster runs Ray {rays[0]} and Python {pythons[0]}, this is Ray {rays[1]} and Python {pythons[1]}"
