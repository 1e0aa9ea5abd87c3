"""The bench of one REINFORCE + KL update: its time compared with the reference's, and its memory.

Not here: rollouts (`generation`).
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.core.reference import Reference
from benchmarks.core.shape import Subject
from benchmarks.harness import Figures, interleaved, measure, ratio
from t2ray.config.rl import RLConfig
from t2ray.core import Completion, Example, Mixture, Token
from t2ray.grades import Grade, Rollout
from t2ray.store import Store
from t2ray.tasks.task import Task
from t2ray.training.loss import Weighed
from t2ray.training.trainer import Trainer

LAMBDA = 0.1


def update(subject: Subject, repeats: int) -> Figures:
    """Measures one update of all rollouts at once, and the peak memory of one in four micro-batches."""
    rollouts = random_rollouts(subject)
    advantage_B = [1.0 if i % 2 else -1.0 for i in range(len(rollouts))]
    part = Weighed(rollouts=rollouts, advantage_B=advantage_B, share_B=[1.0] * len(rollouts))
    reference = Reference(subject.plain, subject.factors)
    rows = [(r.completion.prompt_ids, r.completion.token_ids) for r in rollouts]
    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(subject, folder, micro_batch=len(rollouts))
        quarter = trainer(subject, folder, micro_batch=max(1, len(rollouts) // 4))
        z_K = subject.model.adapter.bank["bench"]
        times = interleaved(
            {
                "ours": lambda: whole.update([part], len(rollouts), 1),
                "reference": lambda: reference.gradient(z_K, rows, advantage_B, LAMBDA),
            },
            repeats,
        )
        made = Allocations()
        with made:
            quarter.update([part], len(rollouts), 1)
    held = sum(tensor.nbytes for tensor in (*subject.model.hf.parameters(), *subject.model.hf.buffers()))
    bound = held + activation_bytes(subject, rollouts[: max(1, len(rollouts) // 4)])
    return {
        "over_reference": measure(ratio(times, "reference", "ours"), 3.0),
        "peak_over_bound": measure([(held + made.peak) / bound], 1.0, at_most=True),
        "update_s": measure(times["ours"]),
    }


def trainer(subject: Subject, folder: str, micro_batch: int) -> Trainer:
    """Returns a trainer of the expert "bench"; its `update` is given rollouts and needs no rewards."""

    async def unused(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
        raise AssertionError("updates are measured without rewards")

    task = Task(
        name="bench", rows=lambda split: [{}], messages=lambda row: (), reward="", gold=None, max_tokens=1
    )  # fmt: skip
    rl = RLConfig(micro_batch=micro_batch, kl=LAMBDA, sigma=0.05, lr=1e-3)
    engine = subject.engine
    return Trainer(
        subject.model, engine.generate, lambda name, z_K: engine.set_experts({name: z_K}),
        task, unused, rl, Store(folder), seed=0, digest="bench",
    )  # fmt: skip


def random_rollouts(subject: Subject) -> list[Rollout]:
    """Returns `shape.rows` random rollouts of `shape.sequence` tokens, prompt included."""
    shape, draw = subject.shape, random.Random(3)
    return [
        Rollout(
            example=Example(id="bench", messages=prompt, row={}),
            completion=Completion(
                prompt_ids=subject.model.chat.encode(prompt),
                tokens=tuple(
                    Token(id=draw.randrange(3, shape.vocabulary), text="", logprob=0.0)
                    for _ in range(shape.sequence - shape.prompt)
                ),
                text="", finish_reason="length", mixture=Mixture.parse("bench"),
            ),
            grade=Grade.of(1.0),
        )
        for prompt in subject.prompts(shape.rows)
    ]  # fmt: skip


def activation_bytes(subject: Subject, rollouts: Sequence[Rollout]) -> int:
    """Returns the bytes that a factored forward pass of these rollouts allocates in all."""
    model = subject.model
    ids_BT = torch.tensor([[*r.completion.prompt_ids, *r.completion.token_ids] for r in rollouts])
    z_1K = model.adapter.mix(Mixture.parse("bench"))[None]

    made = Allocations()
    with made, torch.no_grad(), model.adapter.rows(z_1K):
        model.logits(model.hidden(ids_BT, torch.ones_like(ids_BT)))
    return made.total


class Allocations(TorchDispatchMode):
    """Counts within `with` the bytes of all tensors that operations make (`total`), and the most at a time (`peak`)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0
        self.peak: int = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation, and counts the storages of its results that are not those of its arguments."""
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.alive:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.total += storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_mkldnn]
