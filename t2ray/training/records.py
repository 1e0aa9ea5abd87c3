"""What a run leaves for people to open: `metrics.jsonl`, TensorBoard events, and the rollouts as Parquet.

The first worker of a domain alone writes them. Not here: what W&B and MLflow are told (`trackers`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from t2ray.core import ResourceError
from t2ray.grades import Rollout
from t2ray.store import Store
from t2ray.training.metrics import METRICS, StepMetrics, as_lines, check_metrics, note

if TYPE_CHECKING:
    from t2ray.training.trackers import Trackers


class Records:
    """The records of a domain in its folder; a resumed run forgets the steps after its checkpoint."""

    def __init__(self, store: Store, step: int, trackers: Trackers | None = None) -> None:
        """`step` is the last step that stands; `trackers` are told every step, too."""
        self.store, self.trackers = store, trackers
        found = check_metrics(store)
        self.rows = [row for row in found.rows if row.step <= step]
        if found.damage or len(self.rows) < step:
            why = found.damage[0] if found.damage else f"{METRICS} lacks rows"
            note(store, f"{why}; of steps 1 to {step} it holds {len(self.rows)}, which changes nothing in the training")
        self._write_metrics()
        self.events = None if store.local is None else Events(store.local / "tensorboard", step)

    def log(self, row: StepMetrics, rollouts: Sequence[Rollout]) -> None:
        """Writes the metrics of a step everywhere, and its rollouts.

        Raises:
            ResourceError: the disk is full.
        """
        self.rows.append(row)
        self.store.write_bytes(f"rollouts/step_{row.step:06d}.parquet", rollouts_parquet(rollouts))
        self._add_metrics(row)
        if self.trackers is not None:
            self.trackers.tell(self.rows)

    def close(self) -> None:
        """Closes what is open. While an error is on its way up, the trackers are told that the run failed."""
        if self.events is not None:
            self.events.file.close()
        if self.trackers is not None:
            self.trackers.close(self.rows, failed=sys.exception() is not None)

    def _add_metrics(self, row: StepMetrics) -> None:
        if self.store.local is None or self.events is None:
            self._write_metrics()
            return
        try:
            with open(self.store.local / METRICS, "a", encoding="utf-8") as file:
                file.write(as_lines([row]))
            self.events.write(row)
        except OSError as error:
            raise ResourceError(
                f"cannot write the records of {self.store.uri} ({error}); free some space, then go on with --resume"
            ) from error

    def _write_metrics(self) -> None:
        self.store.write_text(METRICS, as_lines(self.rows))


class Events:
    """A TensorBoard event file, written as it goes: torch's `SummaryWriter` has a thread that fails by itself."""

    def __init__(self, folder: Path, step: int) -> None:
        """TensorBoard drops what earlier files of the folder hold beyond `step`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file = FileIO(folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}", "w")  # unbuffered
        self.writer = RecordWriter(self.file)
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, row: StepMetrics) -> None:
        """Writes every figure of a step as a scalar."""
        values = [Summary.Value(tag=key, simple_value=value) for key, value in row.values.items()]
        self._add(step=row.step, summary=Summary(value=values))

    def _add(self, **what: Any) -> None:
        self.writer.write(Event(wall_time=time.time(), **what).SerializeToString())


def rollouts_parquet(rollouts: Sequence[Rollout]) -> bytes:
    """Returns one row per rollout: prompt and completion as text and as ids, logprobs, how it ended, the reward.

    The reward is null where the verifier abstained. Where a task weighs several, each has a column of its own.
    """
    done = [r.completion for r in rollouts]
    names = dict.fromkeys(name for r in rollouts for name in r.grade.parts)
    table = pa.table(
        {
            "example": [r.example.id for r in rollouts],
            "prompt": [r.example.messages[-1].text for r in rollouts],
            "completion": [c.text for c in done],
            "prompt_ids": pa.array([c.prompt_ids for c in done], pa.list_(pa.int32())),
            "token_ids": pa.array([c.token_ids for c in done], pa.list_(pa.int32())),
            "logprobs": pa.array([c.logprobs for c in done], pa.list_(pa.float32())),
            "finish_reason": [c.finish_reason for c in done],
            "reward": pa.array([r.reward for r in rollouts], pa.float32()),
            **{name: pa.array([r.grade.parts.get(name) for r in rollouts], pa.float32()) for name in names},
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())
