"""Trains one expert: rollouts of the current policy, verified; REINFORCE + KL on its vector; the best one is kept.

The algorithm is `Trainer.step` and `Trainer.run` (paper section 3.1). Not here: Ray (`t2ray.cluster.train`), the
formats of files (`records`, `checkpoint`) and the registry.

Shapes: B rollouts of a share, K numbers of the expert's vector.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from t2ray.adapters.model import Model
from t2ray.config.train import RLConfig
from t2ray.core import Generate, Mixture, Rollout, RunError, SamplingParams, Verify
from t2ray.store import Store
from t2ray.tasks.task import Task
from t2ray.training.checkpoint import Checkpoint, Progress, latest, moments, restore_moments
from t2ray.training.loss import LossTerms, advantages, backward
from t2ray.training.metrics import StepMetrics, note
from t2ray.training.records import Records
from t2ray.training.rollout import prompts_of_step, roll_out, rollout_seed
from t2ray.training.shares import Shares

if TYPE_CHECKING:
    from t2ray.training.trackers import Trackers

ReportMetrics = Callable[[StepMetrics], None]
Publish = Callable[[str, Tensor], None]
"""Makes a vector, (K,), the expert of that name for the `Generate` that the trainer samples with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A finished run: the best z, (K,), with its validation accuracy, the base's, and the step it was reached at."""

    z_K: Tensor
    accuracy: float
    base_accuracy: float
    best_step: int
    steps: int


class Trainer:
    """One domain's training run in `store`, resumed from its newest sound checkpoint."""

    def __init__(
        self,
        model: Model,
        generate: Generate,
        publish: Publish,
        task: Task,
        verify: Verify,
        rl: RLConfig,
        store: Store,
        *,
        seed: int,
        digest: str,
        shares: int = 1,
    ) -> None:
        """
        Args:
            model: what is differentiated; `generate` samples from the same weights.
            digest: the configuration's; a checkpoint of another one is refused.
            shares: into how many parts a batch is split at least; as many give the same z on any number of workers.

        Raises:
            RunError: the newest checkpoint belongs to another configuration.
        """
        self.model, self.generate, self.publish = model, generate, publish
        self.task, self.verify, self.rl, self.store = task, verify, rl, store
        self.seed, self.digest, self.shares = seed, digest, Shares(shares)
        self.train = task.examples("train")
        self.validation = task.examples("validation", rl.eval_prompts)
        self.policy = Mixture.of({task.name: 1.0})
        self.sampling = SamplingParams(max_tokens=task.max_tokens, temperature=rl.temperature)
        noise_K = rl.sigma * torch.randn(model.adapter.size, generator=torch.Generator().manual_seed(seed))
        self.p_K = model.adapter.initial(rl.init, noise_K).requires_grad_()
        self.optimiser = torch.optim.AdamW([self.p_K], lr=rl.lr, weight_decay=0.0)
        self.progress = Progress()
        self.best_z_K = self._z().detach().clone()
        damaged: list[str] = []
        checkpoint = latest(store, digest, damaged.append)
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.shares.rank == 0:
            for line in damaged:
                note(store, f"{line}; the run went on after step {self.progress.step}")
        self.publish(task.name, self._z().detach().clone())

    # -------------------------------------------------------------------------------------------------- the algorithm

    async def run(self, report: ReportMetrics, trackers: Trackers | None = None) -> Trained:
        """Trains to the end, or until `rl.patience` validations brought nothing better; `report` gets each step.

        Raises:
            RewardError: the verifier failed on an example.
            RunError: z, the loss or the gradient is not finite; the newest checkpoint stands.
            ResourceError: the disk is full; the newest checkpoint stands.
        """
        records = Records(self.store, self.progress.step, trackers) if self.shares.rank == 0 else None
        try:
            await self._steps(records, report)
        finally:
            if records is not None:
                records.close()
        p = self.progress
        return Trained(
            z_K=self.best_z_K,
            accuracy=p.best_accuracy,
            base_accuracy=p.base_accuracy,
            best_step=p.best_step,
            steps=p.step,
        )

    async def _steps(self, records: Records | None, report: ReportMetrics) -> None:
        if self.progress.step == 0:
            await self._validate()
        while not self.progress.done:
            metrics, rollouts = await self.step(self.progress.step + 1)
            if metrics.step % self.rl.eval_every == 0 or metrics.step == self.rl.steps:
                metrics = replace(metrics, validation=await self._validate())
            if records is not None:
                records.log(metrics, rollouts)
            if metrics.validation is not None:
                self._save()
            report(metrics)

    async def step(self, step: int) -> tuple[StepMetrics, list[Rollout]]:
        """Rolls out, rewards, and moves z along the gradient once.

        Raises:
            RunError: z, the loss or the gradient is not finite; nothing of the step is kept.
        """
        start = time.perf_counter()
        parts = [await self._roll_out(step, share) for share in self.shares.own]
        rewards = [torch.tensor([r.reward for r in part], dtype=torch.float64) for part in parts]
        total, right, batch = self.shares.sum([_counted(reward_B) for reward_B in rewards]).tolist()
        advantage = [advantages(r_B, self.rl.samples, self.rl.baseline, total / batch).tolist() for r_B in rewards]
        terms, grad_norm = self.update(parts, advantage, int(batch), step)
        z_K = self._z().detach().clone()
        metrics = StepMetrics(
            step=step, reward_mean=total / batch, accuracy=right / batch, kl=terms.kl / max(terms.tokens, 1),
            loss=terms.loss, grad_norm=grad_norm, z_min=float(z_K.min()), z_max=float(z_K.max()),
            seconds=(seconds := time.perf_counter() - start), tokens_per_s=terms.tokens / seconds,
        )  # fmt: skip
        if odd := metrics.not_finite:
            what = ", ".join(f"{name} is {value}" for name, value in odd.items())
            raise RunError(f"step {step}: {what}; the checkpoint before stands: lower rl.lr, in another run=NAME")
        self.publish(self.task.name, z_K)
        self.progress = replace(self.progress, step=step, done=step >= self.rl.steps)
        return metrics, [rollout for part in parts for rollout in part]

    def update(
        self, parts: list[list[Rollout]], advantage: list[list[float]], batch: int, step: int
    ) -> tuple[LossTerms, float]:
        """One AdamW step on z from the whole batch, of which these are this worker's shares with their advantages.

        Returns:
            The loss's sums and the gradient's norm.
        """
        z_K = self._z()
        own = [self._gradient(z_K, *share, batch) for share in zip(parts, advantage, strict=True)]
        gradient_K = self.shares.sum([share_K for share_K, _ in own])
        loss, kl, tokens = self.shares.sum([terms for _, terms in own]).tolist()
        self.optimiser.zero_grad()
        z_K.backward(gradient_K)
        grad_norm = float(torch.nn.utils.clip_grad_norm_([self.p_K], self.rl.clip))
        self.optimiser.param_groups[0]["lr"] = self._lr(step)
        self.optimiser.step()
        return LossTerms(loss=loss, kl=kl, tokens=int(tokens)), grad_norm

    # ------------------------------------------------------------------------------------------------------ its parts

    async def _roll_out(self, step: int, share: int) -> list[Rollout]:
        """A share of the step's rollouts."""
        places = range(share, self.rl.prompts, self.shares.total)
        chosen = prompts_of_step(self.train, self.rl.prompts, step, self.seed)
        seeds = [[rollout_seed(self.seed, step, i, j) for j in range(self.rl.samples)] for i in places]
        examples = [chosen[i] for i in places]
        return await roll_out(self.generate, self.verify, examples, self.policy, self.sampling, seeds)

    def _gradient(
        self, z_K: Tensor, rollouts: list[Rollout], advantage_B: list[float], batch: int
    ) -> tuple[Tensor, Tensor]:
        """A share's gradient, (K,), and its loss, KL and tokens, in micro-batches."""
        leaf_1K = z_K.detach()[None].requires_grad_()
        leaf_1K.grad = torch.zeros_like(leaf_1K)
        order = sorted(range(len(rollouts)), key=lambda i: _length(rollouts[i]))  # rows of like length pad little
        sums = torch.zeros(3, dtype=torch.float64)
        for start in range(0, len(order), self.rl.micro_batch):
            part = order[start : start + self.rl.micro_batch]
            terms = backward(
                self.model, leaf_1K, [rollouts[i] for i in part], [advantage_B[i] for i in part],
                lam=self.rl.kl, temperature=self.rl.temperature, batch=batch,
            )  # fmt: skip
            sums += torch.tensor([terms.loss, terms.kl, terms.tokens], dtype=torch.float64)
        return leaf_1K.grad[0], sums

    async def _validate(self) -> float:
        """Greedy accuracy on the validation prompts; keeps z when it is at least as good as the best so far."""
        greedy = replace(self.sampling, temperature=0.0)
        mixture = self.policy if self.progress.step else Mixture.base()
        sums = []
        for share in self.shares.own:
            chosen = self.validation[share :: self.shares.total]
            rollouts = await roll_out(self.generate, self.verify, chosen, mixture, greedy, [[0]] * len(chosen))
            sums.append(_counted(torch.tensor([r.reward for r in rollouts], dtype=torch.float64)))
        reward, accuracy, _ = (self.shares.sum(sums) / len(self.validation)).tolist()
        p = self.progress
        if p.step == 0:
            self.progress = replace(p, base_accuracy=accuracy, best_accuracy=accuracy, best_reward=reward)
        elif (accuracy, reward) >= (p.best_accuracy, p.best_reward):
            stale = p.stale + 1 if (accuracy, reward) == (p.best_accuracy, p.best_reward) else 0
            self.progress = replace(p, best_accuracy=accuracy, best_reward=reward, best_step=p.step, stale=stale)
            self.best_z_K = self._z().detach().clone()
        else:
            self.progress = replace(p, stale=p.stale + 1)
        if self.rl.patience and self.progress.stale >= self.rl.patience:
            self.progress = replace(self.progress, done=True)
        return float(accuracy)

    def _z(self) -> Tensor:
        return self.model.adapter.vector(self.rl.init, self.p_K)

    def _lr(self, step: int) -> float:
        if self.rl.schedule == "constant":
            return self.rl.lr
        return self.rl.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 1) / self.rl.steps)))

    def _save(self) -> None:
        if self.shares.rank == 0:
            tensors = {"p_K": self.p_K.detach(), "best_z_K": self.best_z_K, **moments(self.optimiser, self.p_K)}
            Checkpoint(progress=self.progress, tensors=tensors).save(self.store, self.digest)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.progress = checkpoint.progress
        with torch.no_grad():
            self.p_K.copy_(checkpoint.tensors["p_K"])
        self.best_z_K = checkpoint.tensors["best_z_K"].to(self.model.device)
        restore_moments(self.optimiser, self.p_K, checkpoint.tensors, checkpoint.progress.step)


def _counted(reward_B: Tensor) -> Tensor:
    """The sum of the rewards, the number of right answers, and the number of answers: (3,), float64."""
    return torch.stack([reward_B.sum(), (reward_B > 0).sum(), torch.tensor(len(reward_B))])


def _length(rollout: Rollout) -> int:
    return len(rollout.completion.prompt_ids) + len(rollout.completion.tokens)
