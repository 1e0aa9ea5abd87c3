"""Trains one expert: rollouts in folded mode, verified; REINFORCE + KL on z; greedy validation; the best z is kept.

The algorithm is `Trainer.step` and `Trainer.run`. Not here: Ray (`cluster.train` runs a trainer in each worker), files'
formats (`rl.records`, `rl.checkpoint`) and the registry. With torch.distributed initialised the workers take a batch's
shares between them and sum z's gradient; without it the trainer is alone. The sums have an order of their own, so that
as many shares make the same z, bit for bit, whatever the number of workers.

Shapes: B rollouts of a share, S shares of a batch, K singular values of all targets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed

from t2ray.adapters.svf import parametrise
from t2ray.config.train import RLConfig
from t2ray.core import Mixture, Rollout, SamplingParams, Verify
from t2ray.engine.offline import OfflineEngine
from t2ray.store import Store
from t2ray.tasks.task import Task
from t2ray.training.checkpoint import Checkpoint, Progress, latest, moments, restore_moments
from t2ray.training.loss import LossTerms, advantages, backward
from t2ray.training.records import Records
from t2ray.training.rollout import prompts_of_step, roll_out, rollout_seed

ReportMetrics = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A finished run: the best z, (K,), with its validation accuracy, the base's, and the step it was reached at."""

    z_K: Tensor
    accuracy: float
    base_accuracy: float
    best_step: int
    steps: int


class Trainer:
    """One domain's training run in `store`, resumed from its newest checkpoint."""

    def __init__(
        self,
        engine: OfflineEngine,
        task: Task,
        verify: Verify,
        rl: RLConfig,
        store: Store,
        *,
        seed: int,
        digest: str,
        shares: int = 1,
    ) -> None:
        """`digest` is the configuration's: a checkpoint of another one is refused (RunError).

        Each batch is split into so many `shares`, or one a worker where there are more workers.
        """
        self.engine, self.task, self.verify, self.rl, self.store = engine, task, verify, rl, store
        self.model, self.svf = engine.model, engine.model.svf
        self.seed, self.digest = seed, digest
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self.shares = max(shares, self.world)
        self.own = range(self.rank, self.shares, self.world)
        self.train = task.examples("train")
        self.validation = task.examples("validation", rl.eval_prompts)
        self.policy = Mixture.of({task.name: 1.0})
        self.sampling = SamplingParams(max_tokens=task.max_tokens, temperature=rl.temperature)
        self.p_K = self._initial().requires_grad_()
        self.best_z_K = self._z().detach().clone()
        self.optimiser = torch.optim.AdamW([self.p_K], lr=rl.lr, weight_decay=0.0)
        self.progress = Progress()
        checkpoint = latest(store, digest)
        if checkpoint is not None:
            self._restore(checkpoint)
        self._publish()

    # -------------------------------------------------------------------------------------------------- the algorithm

    async def run(self, report: ReportMetrics) -> Trained:
        """Trains to the end, or until `rl.patience` validations brought nothing better; `report` gets each step's row.

        Raises:
            RewardError: the verifier failed on an example.
            ResourceError: the disk is full; the newest checkpoint stands.
        """
        records = Records(self.store, self.progress.step) if self.rank == 0 else None
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
            row, rollouts = await self.step(self.progress.step + 1)
            if row["step"] % self.rl.eval_every == 0 or row["step"] == self.rl.steps:
                row |= await self._validate()
            if records is not None:
                records.log(row, rollouts)
            if "validation" in row:
                self._save()
            report(row)

    async def step(self, step: int) -> tuple[dict[str, Any], list[Rollout]]:
        """Rolls out, rewards, and moves z along the gradient once."""
        start = time.perf_counter()
        parts = [await self._roll_out(step, share) for share in self.own]
        rewards = [torch.tensor([r.reward for r in part], dtype=torch.float64) for part in parts]
        total = self._sum([torch.stack([r_B.sum(), (r_B > 0).sum(), torch.tensor(len(r_B))]) for r_B in rewards])
        reward_mean, batch = float(total[0] / total[2]), int(total[2])
        advantage = [advantages(r_B, self.rl.samples, self.rl.baseline, reward_mean).tolist() for r_B in rewards]
        terms, grad_norm = self.update(parts, advantage, batch, step)
        self.progress = replace(self.progress, step=step, done=step >= self.rl.steps)
        self._publish()
        z_K, seconds = self.svf.bank[self.task.name], time.perf_counter() - start
        return {
            "step": step, "reward_mean": reward_mean, "accuracy": float(total[1] / total[2]),
            "kl": terms.kl / max(terms.tokens, 1), "loss": terms.loss, "grad_norm": grad_norm,
            "z_min": float(z_K.min()), "z_max": float(z_K.max()),
            "tokens_per_s": terms.tokens / seconds, "seconds": seconds,
        }, [rollout for part in parts for rollout in part]  # fmt: skip

    def update(
        self, parts: list[list[Rollout]], advantage: list[list[float]], batch: int, step: int
    ) -> tuple[LossTerms, float]:
        """One AdamW step on z from the whole batch, of which these are this worker's shares with their advantages.

        Returns:
            The loss's sums and the gradient's norm.
        """
        z_K = self._z()
        own = [self._gradient(z_K, *share, batch) for share in zip(parts, advantage, strict=True)]
        gradient_K = self._sum([share_K for share_K, _ in own])
        loss, kl, tokens = self._sum([terms for _, terms in own]).tolist()
        self.optimiser.zero_grad()
        z_K.backward(gradient_K)
        grad_norm = float(torch.nn.utils.clip_grad_norm_([self.p_K], self.rl.clip))
        self.optimiser.param_groups[0]["lr"] = self._lr(step)
        self.optimiser.step()
        return LossTerms(loss=loss, kl=kl, tokens=int(tokens)), grad_norm

    # ------------------------------------------------------------------------------------------------------ its parts

    async def _roll_out(self, step: int, share: int) -> list[Rollout]:
        """A share of the step's rollouts."""
        places = range(share, self.rl.prompts, self.shares)
        chosen = prompts_of_step(self.train, self.rl.prompts, step, self.seed)
        seeds = [[rollout_seed(self.seed, step, i, j) for j in range(self.rl.samples)] for i in places]
        return await roll_out(
            self.engine.generate, self.verify, [chosen[i] for i in places], self.policy, self.sampling, seeds
        )

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

    def _sum(self, own: list[Tensor]) -> Tensor:
        """The sum over all shares, of which this worker has `own`: zeros added in between change no bit of it."""
        all_SX = own[0].new_zeros(self.shares, *own[0].shape)
        all_SX[list(self.own)] = torch.stack(own)
        if self.world > 1:
            distributed.all_reduce(all_SX)
        return all_SX.sum(0)

    async def _validate(self) -> dict[str, float]:
        """Greedy accuracy on the validation prompts; keeps z when it is at least as good as the best so far."""
        greedy = replace(self.sampling, temperature=0.0)
        mixture = self.policy if self.progress.step else Mixture.base()
        sums = []
        for share in self.own:
            chosen = self.validation[share :: self.shares]
            rollouts = await roll_out(self.engine.generate, self.verify, chosen, mixture, greedy, [[0]] * len(chosen))
            rewards_B = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
            sums.append(torch.stack([(rewards_B > 0).sum(), rewards_B.sum()]))
        accuracy, reward = (self._sum(sums) / len(self.validation)).tolist()
        p = self.progress
        if p.step == 0:
            self.progress = replace(p, base_accuracy=accuracy, best_accuracy=accuracy, best_reward=reward)
        elif (accuracy, reward) >= (p.best_accuracy, p.best_reward):
            stale = p.stale + 1 if (accuracy, reward) == (p.best_accuracy, p.best_reward) else 0
            self.progress = replace(p, best_accuracy=accuracy, best_reward=reward, best_step=p.step, stale=stale)
            self.best_z_K = self.svf.bank[self.task.name].clone()
        else:
            self.progress = replace(p, stale=p.stale + 1)
        if self.rl.patience and self.progress.stale >= self.rl.patience:
            self.progress = replace(self.progress, done=True)
        return {"validation": accuracy}

    def _initial(self) -> Tensor:
        """The parameters at the start, (K,): z = 1 + N(0, sigma^2), or p = 0.1 + N(0, sigma^2) before a sigmoid."""
        noise_K = torch.randn(self.svf.K, generator=torch.Generator().manual_seed(self.seed))
        start = 1.0 if self.rl.init == "scale" else 0.1
        return (start + self.rl.sigma * noise_K).to(self.model.device)

    def _z(self) -> Tensor:
        return parametrise(self.p_K, self.rl.init, self.svf.s_K, [t.rank for t in self.svf.layout])

    def _publish(self) -> None:
        """Makes the current z the expert that rollouts and validation ask for."""
        self.svf.bank[self.task.name] = self._z().detach().clone()

    def _lr(self, step: int) -> float:
        if self.rl.schedule == "constant":
            return self.rl.lr
        return self.rl.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 1) / self.rl.steps)))

    def _save(self) -> None:
        if self.rank == 0:
            tensors = {"p_K": self.p_K.detach(), "best_z_K": self.best_z_K, **moments(self.optimiser, self.p_K)}
            Checkpoint(progress=self.progress, tensors=tensors).save(self.store, self.digest)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.progress = checkpoint.progress
        with torch.no_grad():
            self.p_K.copy_(checkpoint.tensors["p_K"])
        self.best_z_K = checkpoint.tensors["best_z_K"].to(self.model.device)
        restore_moments(self.optimiser, self.p_K, checkpoint.tensors, checkpoint.progress.step)


def _length(rollout: Rollout) -> int:
    return len(rollout.completion.prompt_ids) + len(rollout.completion.token_ids)
