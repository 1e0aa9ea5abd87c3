"""The checkpoints of a training run: the parameters of z, AdamW's moments, the best z so far, and where the run stands.

A checkpoint is one safetensors file, written whole or not at all, with a digest of what it holds; the two newest are
kept. Other files in their folder are neither read nor deleted. Random numbers and the data cursor need no saving: both
are functions of (seed, step).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from t2ray.core import RunError
from t2ray.integrity import Damaged, digest_of
from t2ray.store import Store

FOLDER = "checkpoints"
_EARLIER = re.compile(r"[0-9a-f]{16}")  # a digest of earlier versions, which no other version can compute
TENSORS = frozenset({"p_K", "best_z_K", "exp_avg", "exp_avg_sq"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands: the next step is `step + 1`.

    `best_step` had the best validation, and `stale` validations came after it that were not better. `better` says
    whether the best z has a better validation than the base, which has `base_accuracy`. `skipped` steps had no signal
    and did not move z. `done` says that the run has ended.
    """

    step: int = 0
    best_step: int = 0
    best_accuracy: float = -1.0
    best_reward: float = -2.0
    stale: int = 0
    base_accuracy: float = -1.0
    skipped: int = 0
    better: bool = False
    done: bool = False

    def measured(self, accuracy: float, reward: float) -> Progress:
        """Returns where the run stands before its first step, after the base was validated."""
        return replace(self, base_accuracy=accuracy, best_accuracy=accuracy, best_reward=reward)

    def validated(self, accuracy: float, reward: float) -> Progress:
        """Returns where the run stands after a validation of its z: accuracy counts first, then the mean reward.

        The earlier of two equal ones stays the best.
        """
        if (accuracy, reward) <= (self.best_accuracy, self.best_reward):
            return replace(self, stale=self.stale + 1)
        return replace(
            self, best_accuracy=accuracy, best_reward=reward, best_step=self.step, better=True, stale=0
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state after a step: `tensors` are `p_K`, `best_z_K` and AdamW's `exp_avg`, `exp_avg_sq`, all (K,) float32."""

    progress: Progress
    tensors: dict[str, Tensor]

    def save(self, store: Store, digest: str) -> None:
        """Writes the checkpoint of its step, then deletes those before it but for one.

        Raises:
            RunError: a tensor has a number that is not finite; the checkpoints before stand.
            ResourceError: the disk is full; the checkpoints before stand.
        """
        if odd := _not_finite(self.tensors):
            raise RunError(f"step {self.progress.step}: {odd} is not finite, and no checkpoint of it is written")
        path = _path(self.progress.step)
        if store.is_folder(path):  # nobody's checkpoint, but in its place
            store.fs.move(f"{store.root}/{path}", f"{store.root}/{path}.aside-{uuid.uuid4().hex[:8]}")
        progress = json.dumps(asdict(self.progress))
        own = digest_of(self.tensors, progress, digest)
        store.write_tensors(path, self.tensors, {"progress": progress, "config": digest, "digest": own})
        for step in [step for step in steps(store) if step <= self.progress.step][:-2]:
            if not store.is_folder(_path(step)):
                store.delete(_path(step))


def steps(store: Store) -> list[int]:
    """Returns the steps that have a checkpoint, sound or not, rising."""
    found = (re.fullmatch(r"step_(\d{6}|[1-9]\d{6,})\.safetensors", name) for name in store.names(FOLDER))
    return sorted(int(match[1]) for match in found if match)


def latest(store: Store, digest: str, tell: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """Returns the newest sound checkpoint, or None if there is none; `tell` gets a line about each newer, damaged one.

    Raises:
        RunError: it was made by another configuration.
        ResourceError: it cannot be read.
    """
    for step in reversed(steps(store)):
        try:
            return _read(store, step, digest)
        except Damaged as error:
            tell(f"{_path(step)} is damaged: {error}")
        except FileNotFoundError:
            tell(f"{_path(step)} was deleted")
    return None


def _read(store: Store, step: int, digest: str) -> Checkpoint:
    path = _path(step)
    tensors, metadata = store.read_safetensors(path)
    config = metadata.get("config")
    if metadata.get("digest", own := digest_of(tensors, metadata.get("progress", ""), config or "")) != own:
        raise Damaged("its digest belongs to other numbers")
    if config is not None and config != digest and not _EARLIER.fullmatch(config):
        raise RunError(f"{store.uri}/{path} belongs to another configuration; use another run name")
    try:
        values = json.loads(metadata["progress"])
        progress = Progress(**{"better": values["best_step"] > 0} | values)  # which earlier versions did not write
    except (KeyError, ValueError, TypeError):
        raise Damaged("it does not say where in the run it stands") from None
    if config is None or tensors.keys() != TENSORS or progress.step != step:
        raise Damaged(f"it is no checkpoint of step {step}")
    if odd := _not_finite(tensors):
        raise Damaged(f"{odd} holds numbers that are not finite")
    return Checkpoint(progress=progress, tensors=tensors)


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Returns the name of a tensor with a number that is not finite, if there is one."""
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)


def _path(step: int) -> str:
    return f"{FOLDER}/step_{step:06d}.safetensors"


def moments(optimiser: torch.optim.Optimizer, p_K: Tensor) -> dict[str, Tensor]:
    """Returns AdamW's state of the one parameter, as tensors."""
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
