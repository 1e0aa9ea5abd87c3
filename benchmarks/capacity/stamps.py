"""Records when each stage of a Ray Train job is reached: one line per hook, in the file that `T2RAY_STAMPS` names.

Ray makes one `Stamps` per job if RAY_TRAIN_CALLBACKS names `benchmarks.capacity.stamps.Stamps`. The bench of starting
up (`runs`) sets both variables and reads the file. The hooks are those of Ray's own callbacks.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

FILE = "T2RAY_STAMPS"


class Stamps(ControllerCallback, WorkerGroupCallback):
    """Made in the process that calls `fit`, then sent to the job's controller, which calls the hooks."""

    def __init__(self) -> None:
        self.path, self.domain = os.environ[FILE], ""
        self._stamp("called")

    def after_controller_start(self, train_run_context: Any) -> None:
        """The controller's process has started. The name of a run begins with that of its domain."""
        self.domain = train_run_context.run_config.name.rpartition("-")[0]
        self._stamp("controller")

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """The resources are available."""
        self._stamp("resources")

    def after_worker_group_start(self, worker_group: Any) -> None:
        """The workers' processes have started. Callbacks are called in their order, before Ray's own."""
        self._stamp("workers")

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """The process group has formed, and the training function has been started."""
        self._stamp("started")

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """The controller has noticed the end of the training function."""
        self._stamp("noticed")

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """The workers have ended."""
        self._stamp("ended")

    def _stamp(self, stage: str) -> None:
        line = json.dumps({"domain": self.domain, "stage": stage, "at": time.time()})
        with open(self.path, "a", encoding="utf-8") as file:  # short lines are appended whole
            file.write(line + "\n")
