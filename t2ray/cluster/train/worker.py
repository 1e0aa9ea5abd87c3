"""Trains a domain in a worker, with signs of life in the run folder. This module imports no Ray Train."""

from __future__ import annotations

from typing import Any

import ray

from t2ray.config.train import TrainConfig
from t2ray.core import ResourceError
from t2ray.runs.heartbeat import start_heartbeat
from t2ray.store import Store
from t2ray.training.domain import CONFIG, domain_store, train_domain
from t2ray.training.metrics import StepMetrics
from t2ray.training.trainer import ReportMetrics


def work(job: dict[str, Any], rank: int = 0, report: ReportMetrics = lambda row: None) -> None:
    """Trains the domain of a job; `report` gets the steps that have a validation.

    Raises:
        ResourceError: the run's folder is not seen from this node.
        T2RayError: as `train_domain`.
    """
    config = TrainConfig.model_validate(job["config"])
    run = f"{config.out}/{config.run}"
    if not Store(run).exists(CONFIG):  # a node that came after `check_shared`
        node = ray.util.get_node_ip_address()
        raise ResourceError(f"{run} is not shared: node {node} does not see it; name a folder that all nodes mount")

    beat = start_heartbeat(domain_store(config, job["domain"]), rank)

    def step(metrics: StepMetrics) -> None:
        beat(metrics.step)
        if metrics.validation is not None:
            report(metrics)

    train_domain(config, job["domain"], step)


def environment(config: TrainConfig) -> dict[str, Any]:
    """Returns the runtime environment of a worker, with as many threads as it has CPUs."""
    threads = str(max(1, int(config.cpus or 1)))
    return {"env_vars": {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}}
