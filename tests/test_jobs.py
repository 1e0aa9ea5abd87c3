"""The jobs, submitted as a person submits them: to a cluster that asks for a token, with the working folder and a YAML.

One cluster for the module, started by `ray start --head`. The jobs run the tiny model; each submission costs seconds
before it does anything, and so they go in parallel where they do not need each other.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from endpoint import Endpoint, wait_until
from waiting import GUARD_S, end_all, family

from t2ray.adapters.factors import Factors
from t2ray.experts.registry import Registry
from t2ray.store import Store
from t2ray.training.metrics import read_metrics

pytestmark = [pytest.mark.cluster, pytest.mark.long]

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")
REWARDS = """
from pathlib import Path

def short(completion, row):
    switch = Path(row["switch"])
    if switch.exists() and switch.stat().st_size >= 18:
        raise ZeroDivisionError("unlucky")
    with switch.open("a") as file:
        file.write(".")
    return 1.0 if len(completion) < 12 else -1.0
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of its own, with two CPUs, the suite's token and its dashboard on the loopback."""
    # Ray's sockets have a path of at most 107 characters.
    folder = Path(tmp_path_factory.mktemp("ray", numbered=True))
    temp = tempfile.mkdtemp(prefix="t2ray")
    gcs, dashboard, agent, client = free_ports(4)
    with open(folder / "head.log", "w") as log:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--port={gcs}", "--num-cpus=2", "--dashboard-host=127.0.0.1",
             f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
             f"--ray-client-server-port={client}", f"--temp-dir={temp}", "--disable-usage-stats"],
            stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},  # whose python the jobs run
        )  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    try:
        started = folder / "head.log"
        wait_until(lambda: head.poll() is not None or "Ray runtime started" in started.read_text(), "a head node")
        assert head.poll() is None, started.read_text()
        yield url
    finally:
        end_all([*family(head.pid), psutil.Process(head.pid)])  # asked to stop, Ray takes half a minute
        head.wait()
        shutil.rmtree(temp, ignore_errors=True)


Submit = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the shipped jobs and their YAMLs for the tiny model: what `--working-dir .` uploads."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    shutil.copytree(ROOT / "t2ray", folder / "t2ray", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "rewards_of_jobs.py").write_text(REWARDS)
    rows = [{"text": f"hello {i}", "switch": str(folder / "switch")} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"steps": 4, "prompts": 2, "samples": 2, "eval_every": 2, "eval_prompts": 4}
    own = {
        "data": "rows.jsonl",
        "prompt": "{text}",
        "reward": "rewards_of_jobs:short",
        "max_tokens": 4,
        "publish": "always",
    }
    (folder / "own.yaml").write_text(json.dumps({"model": "tiny", "domains": {"own": own}, "cpus": 1, "rl": small}))
    return folder


@pytest.fixture(scope="module")
def submit(address: str, place: Path) -> Submit:
    def run(*command: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if token or key not in ("RAY_AUTH_TOKEN",)}
        return subprocess.run(
            [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *command],
            cwd=place, env=env | {"HOME": str(place), "COLUMNS": "200"}, capture_output=True, text=True,
            timeout=GUARD_S,
        )  # fmt: skip

    return run


def test_a_submission_without_the_token_is_refused(submit: Submit) -> None:
    done = submit("python", "jobs/train.py", "own.yaml", "run=refused", token=False)
    assert done.returncode != 0
    assert "token" in done.stderr and "submitted successfully" not in done.stdout


def test_jobs_are_submitted_fail_and_are_resumed(submit: Submit, place: Path) -> None:
    """Decompose; train until a reward raises, mend it, submit the same again; meanwhile mistakes are refused."""
    runs, factors = f"out={place}/runs", f"factors={place}/factors"
    done = submit("python", "jobs/decompose.py", "jobs/decompose.yaml", "model=tiny", f"out={place}/factors",
                  "workers=2")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "singular values" in done.stdout  # its log was followed
    assert Factors.open(place / "factors").K > 0

    train = ("python", "jobs/train.py", "own.yaml", "run=own", runs, factors, "--resume")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(submit, *train)
        ephemeral = pool.submit(submit, "python", "jobs/train.py", "own.yaml", "run=lost")
        failed, lost = first.result(), ephemeral.result()
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "'rewards_of_jobs:short'" in failed.stdout and "unlucky" in failed.stdout, failed.stdout
    assert lost.returncode == 1 and "is a folder of the submitted job, which Ray deletes" in lost.stdout
    store = Store(f"{place}/runs/own/domains/own")
    assert store.names("checkpoints") == ["step_000002.safetensors"]

    (place / "switch").unlink()
    (place / "note").write_text("another file, and so another working folder on the cluster")
    again = submit(*train[:3], "workers=0", *train[3:])  # how many do the work changes nothing
    assert again.returncode == 0, again.stdout + again.stderr
    assert "best at step" in again.stdout and "succeeded" in again.stdout
    assert [row.step for row in read_metrics(store)] == [1, 2, 3, 4]


def test_a_run_is_adapted_evaluated_and_swept_by_jobs(submit: Submit, place: Path) -> None:
    run = f"run={place}/runs/own"
    (place / "switch").unlink()  # else the reward goes on raising
    adapt = ("python", "jobs/adapt.py", "jobs/adapt.yaml", run, "task=own", "name=sums", "shots=2", "max_tokens=2",
             "settings.population=4", "settings.iterations=1")  # fmt: skip
    evaluate = ("python", "jobs/evaluate.py", "jobs/evaluate.yaml", run, "tasks=math", "strategies=[base]", "limit=4",
                "max_tokens=2", f"json={place}/figures.json")  # fmt: skip
    sweep = ("python", "jobs/sweep.py", "sweep.yaml", "run=lr", f"out={place}/runs")
    job = {"model": "tiny", "workers": 0, "cpus": 0.5, "verifiers": 0, "domains": {"pick": {"task": "pick"}},
           "rl": {"steps": 1, "prompts": 2, "samples": 1, "eval_prompts": 2}}  # fmt: skip
    space = {"rl.lr": [0.01, 0.02]}
    (place / "sweep.yaml").write_text(json.dumps({"kind": "rl", "job": job, "space": space, "sampler": "grid"}))
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(submit, *words) for words in (adapt, evaluate, sweep)]:
            assert done.result().returncode == 0, done.result().stdout + done.result().stderr
    assert Registry(f"{place}/runs/own/experts").load_mixture("sums")
    assert json.loads((place / "figures.json").read_text())["tasks"]
    assert (place / "runs" / "lr" / "best.yaml").exists()


def test_serve_deploy_starts_the_shipped_file(address: str, tmp_path: Path) -> None:
    """Ray's own command; the file as it is shipped, but for the port."""
    (port,) = free_ports(1)
    shipped = (ROOT / "serve_config.yaml").read_text()
    assert shipped.count("port: 8000") == 1
    (tmp_path / "serve_config.yaml").write_text(shipped.replace("port: 8000", f"port: {port}"))
    serve = [str(BIN / "serve")]
    deployed = subprocess.run(
        [*serve, "deploy", "-a", address, str(tmp_path / "serve_config.yaml")],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
    )
    assert deployed.returncode == 0, deployed.stderr
    endpoint = Endpoint(url=f"http://127.0.0.1:{port}", registry=tmp_path, process=None)
    wait_until(lambda: endpoint.chat("17+25", "t2ray").status_code == 200, "an answer")
    answer = endpoint.chat("17+25", "t2ray").json()
    assert answer["choices"][0]["message"]["content"] == "42" and answer["t2ray"]["mixture"] == {"math": 1.0}
    ended = subprocess.run([*serve, "shutdown", "-y", "-a", address], capture_output=True, text=True, timeout=GUARD_S)
    assert ended.returncode == 0, ended.stderr
