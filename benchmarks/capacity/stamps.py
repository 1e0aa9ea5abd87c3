"""When each stage of a Ray Train job was reached: a line a hook, in the file that `T2RAY_STAMPS` names.

Ray makes one for each job where RAY_TRAIN_CALLBACKS names `benchmarks.capacity.stamps.Stamps`: the bench of starting up
sets both and reads the file (`runs`); nothing else does. The hooks are those that Ray's own callbacks have.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

FILE = "T2RAY_STAMPS"


class Stamps(ControllerCallback, WorkerGroupCallback):
    """Made where `fit` is called, then sent to the job's controller, which calls the rest."""

    def __init__(self) -> None:
        self.path, self.domain = os.environ[FILE], ""
        self._stamp("called")

    def after_controller_start(self, train_run_context: Any) -> None:
        """The controller's process is there. A run's name begins with its domain's."""
        self.domain = train_run_context.run_config.name.rpartition("-")[0]
        self._stamp("controller")

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Resources are to be had."""
        self._stamp("resources")

    def after_worker_group_start(self, worker_group: Any) -> None:
        """The workers' processes are there; called in the order of the callbacks, and before Ray's own."""
        self._stamp("workers")

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """The process group stands and the training function was started."""
        self._stamp("started")

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """The controller has noticed the end."""
        self._stamp("noticed")

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """The workers are gone."""
        self._stamp("ended")

    def _stamp(self, stage: str) -> None:
        line = json.dumps({"domain": self.domain, "stage": stage, "at": time.time()})
        with open(self.path, "a", encoding="utf-8") as file:  # short lines are appended whole
            file.write(line + "\n")
