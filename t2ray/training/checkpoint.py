"""A training run's checkpoints: z's parameters, AdamW's moments, the best z so far, and where in the run they stand.

A checkpoint is one safetensors file, written whole or not at all; the two newest are kept. Random numbers and the
data cursor need no saving: both are functions of (seed, step).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from safetensors import safe_open
from torch import Tensor

from t2ray.core import RunError
from t2ray.store import Store

FOLDER = "checkpoints"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands: the next step is `step + 1`; `best_step` had the best validation, `stale` came after it."""

    step: int = 0
    best_step: int = 0
    best_accuracy: float = -1.0
    best_reward: float = -2.0
    stale: int = 0
    base_accuracy: float = -1.0
    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a step leaves: `tensors` are `p_K`, `best_z_K` and AdamW's `exp_avg`, `exp_avg_sq`, all (K,) float32."""

    progress: Progress
    tensors: dict[str, Tensor]

    def save(self, store: Store, digest: str) -> None:
        """Writes the checkpoint of its step, then drops all but the two newest.

        Raises:
            ResourceError: the disk is full; the checkpoints before stand.
        """
        metadata = {"progress": json.dumps(asdict(self.progress)), "config": digest}
        store.write_tensors(f"{FOLDER}/step_{self.progress.step:06d}.safetensors", self.tensors, metadata)
        for name in store.names(FOLDER)[:-2]:
            store.delete(f"{FOLDER}/{name}")


def latest(store: Store, digest: str) -> Checkpoint | None:
    """The newest checkpoint, or None where there is none.

    Raises:
        RunError: it was made by another configuration.
    """
    names = store.names(FOLDER)
    if not names:
        return None
    path = f"{FOLDER}/{names[-1]}"
    metadata = _metadata(store, path)
    if metadata["config"] != digest:
        raise RunError(f"{store.uri}/{path} belongs to another configuration; use another run name")
    tensors = {name: tensor.clone() for name, tensor in store.read_tensors(path).items()}
    return Checkpoint(progress=Progress(**json.loads(metadata["progress"])), tensors=tensors)


def _metadata(store: Store, path: str) -> dict[str, str]:
    if store.local is not None:
        with safe_open(store.local / path, framework="pt") as file:
            return dict(file.metadata())
    data = store.read_bytes(path)  # the header is JSON behind its length, a little-endian 64-bit number
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length])["__metadata__"])


def moments(optimiser: torch.optim.Optimizer, p_K: Tensor) -> dict[str, Tensor]:
    """AdamW's state of the one parameter, as tensors."""
    state = optimiser.state.get(p_K) or {"exp_avg": torch.zeros_like(p_K), "exp_avg_sq": torch.zeros_like(p_K)}
    return {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def restore_moments(optimiser: torch.optim.Optimizer, p_K: Tensor, tensors: dict[str, Tensor], step: int) -> None:
    """Sets AdamW's state to what `moments` gave after `step` steps."""
    if step:
        optimiser.state[p_K] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors["exp_avg"].to(p_K.device),
            "exp_avg_sq": tensors["exp_avg_sq"].to(p_K.device),
        }
