"""Training on a cluster that was there: every domain, with one worker too, is a job of Ray Train, and Ray knows it.

The z that a domain must end with is that of the same job in one process without Ray, which is a plain task's, too.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from test_train_cluster import experts, of_domains, same, saved, states, undisturbed, wait_for

from t2ray.cli.main import main
from t2ray.cluster.session import PRIVATE, session
from t2ray.cluster.train.launch import DomainsFailed, train
from t2ray.runs.status import read_status
from t2ray.training.domain import EXPERT, domain_store
from t2ray.training.metrics import read_metrics

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def dashboard() -> Iterator[str]:
    """A cluster with a dashboard, whose address it is, to which RAY_ADDRESS leads."""
    # Sockets lie in the folder, so that its name must be short; the dashboard's processes write a little longer.
    short = tempfile.TemporaryDirectory(prefix="t2ray", ignore_cleanup_errors=True)
    with short as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        started = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True, "dashboard_port": 0}
        )
        patch.setenv("RAY_ADDRESS", started.address)
        yield started.head_node.webui_url
        started.shutdown()


def get(address: str) -> str:
    request = urllib.request.Request(
        f"http://{address}", headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read(), "utf-8")


def runs(dashboard: str) -> dict[str, dict[str, Any]]:
    """What the dashboard tells under Train, by the domain."""
    rows = json.loads(get(f"{dashboard}/api/train/v2/runs/v1"))["train_runs"]
    return {row["name"].rpartition("-")[0]: row for row in rows}


def figures(run: str, domain: str) -> dict[str, float]:
    """The cluster's metrics with the tags of a run and of a domain, as Prometheus would read them."""
    found = dict[str, float]()
    for node in ray.nodes():
        for line in get(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith("ray_t2ray_train_") and f'run="{run}"' in name and f'domain="{domain}"' in name:
                found[name.partition("{")[0].removeprefix("ray_t2ray_train_")] = float(value)
    return found


@pytest.mark.slow
def test_a_domain_with_one_worker_is_a_train_run_that_ray_shows_and_has_a_plain_tasks_z(
    tmp_path: Path, dashboard: str
) -> None:
    """Beside one that fails, which ends as a failed run, and which a resume trains alone."""
    expected = undisturbed(tmp_path, "short", steps=6)
    config = of_domains(tmp_path, "shown", {"own": "short", "bad": "broken"}, steps=6)
    with session() as have:  # `train` is attached then, too
        assert PRIVATE not in have
        with pytest.raises(DomainsFailed, match="^domain 'bad' failed: .*ZeroDivisionError: reward; --resume"):
            train(config)
        assert states(config) == {"own": "done", "bad": "failed"} and saved(config) == ("own",)
        told = runs(dashboard)
        assert {domain: run["status"] for domain, run in told.items()} == {"own": "FINISHED", "bad": "ERRORED"}
        assert told["own"]["run_settings"]["scaling_config"]["num_workers"] == 1
        last = read_metrics(domain_store(config, "own"))[-1]
        wait_for(lambda: figures("shown", "own").get("step") == 6)
        assert figures("shown", "own")["validation"] == pytest.approx(last.validation)

        (tmp_path / "mended").touch()
        train(config, resume=True)
        assert states(config) == {"own": "done", "bad": "done"} and saved(config) == ("bad", "own")
    assert same({"own": experts(config)["own"]}, expected)
    assert same({"own": experts(config)["bad"]}, expected)  # of the same data, reward and seed


@pytest.mark.nodes
def test_a_killed_worker_of_a_train_run_is_noted_once_and_changes_no_z(tmp_path: Path, dashboard: str) -> None:
    """With two domains on its model, one of which fails: both are told, and the other goes on."""
    expected = undisturbed(tmp_path, "short")
    config = of_domains(tmp_path, "killed", {"own": "kills", "bad": "broken"}, domains_per_worker=2)
    with session():
        with pytest.raises(DomainsFailed, match="^domain 'bad' failed: .*ZeroDivisionError: reward; --resume"):
            train(config)
        assert "own+1" in runs(dashboard)
        wait_for(lambda: figures("killed", "own").get("step") == 12)
    assert same({"own": domain_store(config, "own").read_tensors(EXPERT)}, expected)
    own, bad = read_status(config)
    assert own.fault is not None and not own.fault.ended
    assert re.match("worker 0 of domains 'own', 'bad' died: node .*, after step ", own.fault.message)
    assert bad.state == "failed" and bad.fault is not None and "ZeroDivisionError" in bad.fault.message


@pytest.mark.nodes
def test_a_sweeps_trials_are_train_runs_beside_the_processes_that_wait_for_them(
    tmp_path: Path, dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"steps": 1, "prompts": 2, "samples": 2, "eval_prompts": 2}
    job = {"model": "tiny", "cpus": 1, "verifiers": 0, "domains": {"swept": {"task": "pick"}}, "rl": small}
    sweep = {"kind": "rl", "job": job, "sampler": "grid", "space": {"rl.lr": [0.01]}, "finalists": 1}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    assert main(["sweep", "sweep.yaml"]) == 0
    with session():
        assert runs(dashboard)["swept"]["status"] == "FINISHED"
