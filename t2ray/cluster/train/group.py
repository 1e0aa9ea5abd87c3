"""A domain as a job of Ray Train: a `TorchTrainer`, whose workers sum their gradients of z; or a worker of several.

It is run once. Not here: what becomes of one that fails (`domains`).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any

from ray import train as ray_train
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.metrics import Gauge

from t2ray.cluster.train.nodes import wait_for_dead_nodes
from t2ray.cluster.train.worker import environment, work
from t2ray.config.train import TrainConfig
from t2ray.core import T2RayError


class WorkersDied(Exception):
    """The workers of a group failed; `causes` has the exception of each, by its rank."""

    def __init__(self, causes: Mapping[int, BaseException]) -> None:
        super().__init__(causes)
        self.causes = causes


class _Metrics(UserCallback):
    """Makes metrics of the cluster, such as `t2ray_train_validation{run, domain}`, of what the first worker reports.

    Ray Train itself keeps no figures of a report without a checkpoint.
    """

    def __init__(self, run: str) -> None:
        self.run, self.gauges = run, dict[str, Gauge]()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Sets the gauges, in the controller of the job."""
        tags = {"run": self.run, "domain": metrics[0]["domain"]}
        for name, value in metrics[0]["figures"].items():
            if name not in self.gauges:
                text = "of the newest step with a validation"
                plain = re.sub(r"\W", "_", name)  # as Prometheus has names
                self.gauges[name] = Gauge(f"t2ray_train_{plain}", description=text, tag_keys=tuple(tags))
            self.gauges[name].set(value, tags)


class Groups:
    """An actor beside the driver that runs jobs of Ray Train, each in a thread; they all end with it.

    A process for each would take 0.29 GB and 3 s of a core more, to import torch and Ray Train again.
    """

    def fit(self, job: dict[str, Any], most: int) -> dict[str, str]:
        """Trains a domain of a job with as many workers as it asks for, at most `most`; or several with one worker.

        Returns what `work` does.

        Raises:
            WorkersDied: the first failures, by rank; all its workers have ended, and Ray knows which nodes are gone.
        """
        config = TrainConfig.model_validate(job["config"])
        least = config.span[0]
        trainer = TorchTrainer(
            _worker,
            train_loop_config=job,
            # Sums of z's gradient (under 1 M numbers) and of scalars on the CPU: nccl refuses the latter.
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(
                num_workers=(least, most) if least < most else most,
                use_gpu=config.gpus > 0,
                resources_per_worker={"CPU": config.cpus} | ({"GPU": config.gpus} if config.gpus else {}),
            ),
            run_config=RunConfig(
                # Ray resumes a name silently: a new one each time leaves the resuming to the run folder's checkpoints.
                name=f"{job['name']}-{uuid.uuid4().hex[:8]}",
                storage_path=f"{config.out}/{config.run}/ray",
                # Started again by `domains`, which counts by checkpoints and knows a mistake from a death.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                worker_runtime_env=environment(config),
                callbacks=[_Metrics(config.run)],
            ),
        )
        try:
            failed: dict[str, str] = trainer.fit().return_value
        except TrainingFailedError as failure:
            wait_for_dead_nodes()
            failures = failure.worker_failures if isinstance(failure, WorkerGroupError) else {0: failure}
            raise WorkersDied({rank: _raised(cause) for rank, cause in failures.items()}) from None
        return failed


def _raised(cause: Exception) -> BaseException:
    """Returns the user's mistake that a worker raised, without the traceback that Ray wraps it in; else the cause."""
    own = getattr(cause, "_base_exc", None)
    return own if isinstance(own, T2RayError) else cause


def _worker(job: dict[str, Any]) -> dict[str, str]:
    """Trains in each Ray Train worker."""
    return work(
        job,
        ray_train.get_context().get_world_rank(),
        lambda domain, row: ray_train.report({"domain": domain, "figures": {"step": row.step, **row.values}}),
    )
