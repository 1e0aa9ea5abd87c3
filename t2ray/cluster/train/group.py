"""A domain with several workers: a job of Ray Train, whose processes sum their gradients of z.

It is run once: what becomes of one that fails is for `cluster.domains`, which calls this in a process of its own.
"""

from __future__ import annotations

import uuid
from typing import Any

from ray import train as ray_train
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from t2ray.cluster.train.domains import WorkersDied, environment, work
from t2ray.cluster.train.nodes import know_the_dead
from t2ray.config.train import TrainConfig
from t2ray.core import T2RayError


def fit(job: dict[str, Any], most: int) -> None:
    """Trains a job's domain with as many workers as it asks for, of a range at most `most`.

    Raises:
        WorkersDied: the first failures, by rank; all its workers have ended, and Ray knows which nodes are gone.
    """
    config, domain = TrainConfig.model_validate(job["config"]), job["domain"]
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
            name=f"{domain}-{uuid.uuid4().hex[:8]}",
            storage_path=f"{config.out}/{config.run}/ray",
            # Started again by `cluster.domains`, which counts by checkpoints and knows a mistake from a death.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            worker_runtime_env=environment(config),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as failure:
        know_the_dead()
        failures = failure.worker_failures if isinstance(failure, WorkerGroupError) else {0: failure}
        raise WorkersDied({rank: _raised(cause) for rank, cause in failures.items()}) from None


def _raised(cause: Exception) -> BaseException:
    """The mistake of the user's that a worker raised, without the traceback that Ray wraps it in; else the cause."""
    own = getattr(cause, "_base_exc", None)
    return own if isinstance(own, T2RayError) else cause


def _worker(job: dict[str, Any]) -> None:
    """Runs in each Ray Train worker."""
    work(job, ray_train.get_context().get_world_rank(), lambda metrics: ray_train.report(metrics.row()))
