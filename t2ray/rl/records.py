"""What a run leaves for people to open: `metrics.jsonl`, TensorBoard events and the rollouts as Parquet.

Written by the first worker of a domain alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t2ray.core import ResourceError, Rollout
from t2ray.store import Store

METRICS = "metrics.jsonl"


class Records:
    """The records of one domain's run, in its folder; a resumed run forgets the steps after its checkpoint."""

    def __init__(self, store: Store, step: int) -> None:
        self.store = store
        self.rows = [row for row in read_metrics(store) if row["step"] <= step]
        self._write_metrics()
        self.tensorboard = None
        if store.local is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(store.local / "tensorboard"), purge_step=step + 1)

    def log(self, row: dict[str, Any], rollouts: Sequence[Rollout]) -> None:
        """One step's metrics, everywhere, and its rollouts.

        Raises:
            ResourceError: the disk is full.
        """
        self.rows.append(row)
        self.store.write_bytes(f"rollouts/step_{row['step']:06d}.parquet", rollouts_parquet(rollouts))
        if self.store.local is None or self.tensorboard is None:
            self._write_metrics()
            return
        try:
            with open(self.store.local / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            for key, value in row.items():
                if key != "step":
                    self.tensorboard.add_scalar(key, value, row["step"])
        except OSError as error:
            raise ResourceError(
                f"cannot write the records of {self.store.uri} ({error}); free some space, then go on with --resume"
            ) from error

    def close(self) -> None:
        """Flushes the TensorBoard events; on a full disk they are lost, and `log` has said so."""
        if self.tensorboard is not None:
            with suppress(OSError):
                self.tensorboard.close()

    def _write_metrics(self) -> None:
        self.store.write_text(METRICS, "".join(json.dumps(row) + "\n" for row in self.rows))


def read_metrics(store: Store) -> list[dict[str, Any]]:
    """The metrics written so far; a last line that a kill cut short is left out."""
    if not store.exists(METRICS):
        return []
    lines = store.read_text(METRICS).split("\n")
    return [json.loads(line) for line in lines[:-1]]


def rollouts_parquet(rollouts: Sequence[Rollout]) -> bytes:
    """One row a rollout: prompt and completion as text and as ids, the ids' logprobs, the reward."""
    done = [r.completion for r in rollouts]
    table = pa.table(
        {
            "example": [r.example.id for r in rollouts],
            "prompt": [r.example.messages[-1].content for r in rollouts],
            "completion": [c.text for c in done],
            "prompt_ids": pa.array([c.prompt_ids for c in done], pa.list_(pa.int32())),
            "token_ids": pa.array([c.token_ids for c in done], pa.list_(pa.int32())),
            "logprobs": pa.array([c.logprobs for c in done], pa.list_(pa.float32())),
            "reward": pa.array([r.reward for r in rollouts], pa.float32()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())
