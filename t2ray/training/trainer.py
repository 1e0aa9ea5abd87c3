"""Trains one expert: rollouts of the current policy are verified, REINFORCE with a KL penalty moves its vector, and the
best vector is kept.

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
from t2ray.config.rl import RLConfig
from t2ray.core import Generate, Mixture, RunError, SamplingParams
from t2ray.grades import Rollout, Verify
from t2ray.store import Store
from t2ray.tasks.task import Task
from t2ray.training.alarms import Alarms
from t2ray.training.checkpoint import Checkpoint, Progress, latest, moments, restore_moments
from t2ray.training.counts import Counts, as_counts, counted
from t2ray.training.loss import Update, Weighed, advantages, gradient, shares_of_tokens
from t2ray.training.metrics import StepMetrics, note, peak_gib
from t2ray.training.records import Records
from t2ray.training.rollout import prompts_of_step, right_answers, roll_out, rollout_seed
from t2ray.training.shares import Shares

if TYPE_CHECKING:
    from t2ray.training.trackers import Trackers

ReportMetrics = Callable[[StepMetrics], None]
Publish = Callable[[str, Tensor], None]
"""Makes a vector, (K,), the expert of that name for the `Generate` that the trainer samples with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a finished run came to: the best z, (K,), with its validation accuracy, the base's, and its step.

    `better` says whether its validation was better than the base's. `steps` were made, and the last `stale` validations
    were not better than the best.
    """

    z_K: Tensor
    accuracy: float
    base_accuracy: float
    best_step: int
    steps: int
    stale: int
    better: bool


class Trainer:
    """The training run of one domain in `store`, resumed from its newest sound checkpoint."""

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
        start_K: Tensor | None = None,
        truncate: float | None = None,
    ) -> None:
        """
        Args:
            model: what is differentiated; `generate` samples from the same weights.
            digest: the configuration's; a checkpoint of another one is refused.
            shares: into how many parts a batch is split at least; as many give the same z on any number of workers.
            start_K: the z that a new run starts from; None for the base.
            truncate: the greatest importance weight of a token, where `generate` is another program than `model`.

        Raises:
            RunError: the newest checkpoint belongs to another configuration.
        """
        self.model, self.generate, self.publish = model, generate, publish
        if rl.objective == "sft":  # the rollouts are the right answers, and all count alike
            rl = rl.model_copy(update={"samples": 1, "baseline": "none", "temperature": 1.0, "kl": 0.0})
        self.task, self.verify, self.rl, self.store = task, verify, rl, store
        self.seed, self.digest, self.shares, self.truncate = seed, digest, Shares(shares), truncate
        self.train = task.examples("train")
        self.validation = task.examples("validation", rl.eval_prompts)
        self.policy = Mixture.of({task.name: 1.0})
        self.sampling = SamplingParams(max_tokens=task.max_tokens, temperature=rl.temperature, to_end=task.to_end)
        self.parts = () if isinstance(task.reward, str) else tuple(task.reward)
        noise_K = rl.sigma * torch.randn(model.adapter.size, generator=torch.Generator().manual_seed(seed))
        self.p_K = model.adapter.initial(rl.init, noise_K, start_K).requires_grad_()
        self.lr = rl.rate(len(self.p_K))
        self.optimiser = torch.optim.AdamW([self.p_K], lr=self.lr, betas=rl.betas, weight_decay=0.0)
        self.progress = Progress()
        self.forked = start_K is not None
        self.faults = Counts()  # of the validations since the last step
        self.best_z_K = model.adapter.neutral.clone()
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
            z_K=self.best_z_K, accuracy=p.best_accuracy, base_accuracy=p.base_accuracy, best_step=p.best_step,
            steps=p.step, stale=p.stale, better=p.better,
        )  # fmt: skip

    async def _steps(self, records: Records | None, report: ReportMetrics) -> None:
        alarms = Alarms(self.rl, f"{self.task.max_tokens} tokens{' or the context' * self.task.to_end}")
        for row in records.rows if records is not None else ():
            alarms.of(row)  # told before
        if self.progress.step == 0:
            await self._begin()
        while not self.progress.done:
            metrics, rollouts = await self.step(self.progress.step + 1)
            if metrics.step % self.rl.eval_every == 0 or metrics.step == self.rl.steps:
                metrics = replace(metrics, validation=await self._compare())
            if records is not None:
                records.log(metrics, rollouts)
                for line in alarms.of(metrics):
                    note(self.store, line)
            if metrics.validation is not None:
                self._save()
            report(metrics)

    async def step(self, step: int) -> tuple[StepMetrics, list[Rollout]]:
        """Rolls out, rewards, and moves z along the gradient `rl.updates` times, unless no rollout has an advantage.

        Figures of the loss are those of the first update, whose z is the one that sampled.

        Raises:
            RunError: z, the loss or the gradient is not finite; nothing of the step is kept.
        """
        start = time.perf_counter()
        rollouts = [await self._roll_out(step, share) for share in self.shares.own]
        counts = self._counts(rollouts, self.rl.samples)
        parts = [self._part(share, counts) for share in rollouts]
        done, *_ = [self.update(parts, max(int(counts.graded), 1), step) for _ in range(self.rl.updates)]
        z_K = self._z().detach().clone()
        faults, self.faults = self.faults, Counts()
        metrics = StepMetrics(
            step=step, kl=done.kl / max(done.tokens, 1), loss=done.loss, grad_norm=done.grad_norm, peak_gib=peak_gib(),
            z_min=float(z_K.min()), z_max=float(z_K.max()), seconds=(seconds := time.perf_counter() - start),
            tokens_per_s=done.tokens / seconds, skipped=int(not done.moved), numbers=len(self.p_K), **counts.figures,
            timeouts=int(counts.timeouts + faults.timeouts), errors=int(counts.errors + faults.errors), **done.weights,
        )  # fmt: skip
        if odd := metrics.not_finite:
            what = ", ".join(f"{name} is {value}" for name, value in odd.items())
            raise RunError(f"step {step}: {what}; the checkpoint before stands: lower rl.lr, in another run=NAME")
        self.publish(self.task.name, z_K)
        skipped = self.progress.skipped + int(not done.moved)
        self.progress = self._ended(replace(self.progress, step=step, skipped=skipped))
        return metrics, [rollout for share in rollouts for rollout in share]

    def update(self, parts: list[Weighed], batch: int, step: int) -> Update:
        """Makes one AdamW step on z from a whole batch, of which these are this worker's shares.

        Where no rollout of the batch has an advantage, z and AdamW's moments stay as they are.
        """
        z_K = self._z()
        own = [gradient(self.model, z_K, part, self.rl, batch=batch, truncate=self.truncate) for part in parts]
        gradient_K = self.shares.sum([share_K for share_K, _ in own])
        loss, kl, tokens, signals, ratio, cut = self.shares.sum([sums for _, sums in own]).tolist()
        self.optimiser.zero_grad()
        z_K.backward(gradient_K)
        grad_norm = float(torch.nn.utils.clip_grad_norm_([self.p_K], self.rl.clip or math.inf))
        self.optimiser.param_groups[0]["lr"] = self._lr(step)
        if signals:
            self.optimiser.step()
        return Update(
            loss=loss, kl=kl, tokens=int(tokens), grad_norm=grad_norm, moved=signals > 0, ratio=ratio, cut=cut
        )

    # ------------------------------------------------------------------------------------------------------ its parts

    async def _roll_out(self, step: int, share: int) -> list[Rollout]:
        """Returns the rollouts of one share of a step, each with an order of its own of the choices that it has."""
        places = range(share, self.rl.prompts, self.shares.total)
        chosen = prompts_of_step(self.train, self.rl.prompts, step, self.seed)
        jobs = [(chosen[i], rollout_seed(self.seed, step, i, j)) for i in places for j in range(self.rl.samples)]
        examples = [self.task.shuffled(example, seed) for example, seed in jobs]
        if self.rl.objective == "sft":
            return right_answers(self.model.chat, self.model.context, self.task, examples)
        seeds = [[seed] for _, seed in jobs]
        return await roll_out(self.generate, self.verify, examples, self.policy, self.sampling, seeds)

    def _part(self, rollouts: list[Rollout], counts: Counts) -> Weighed:
        """Returns a share as the loss takes it; `counts` are those of the whole batch."""
        mean = counts.reward / max(counts.graded, 1.0)
        lengths = [len(rollout.completion.tokens) for rollout in rollouts]
        typical = counts.tokens / max(counts.answers, 1.0)
        return Weighed(
            rollouts=rollouts,
            advantage_B=advantages(_rewards(rollouts), self.rl.samples, self.rl.compared, mean).tolist(),
            share_B=shares_of_tokens(lengths, self.rl.summed, typical, self.task.max_tokens),
        )

    async def _begin(self) -> None:
        """Validates what a run starts from: the base, and the z that it goes on from, if that is another."""
        self.progress = self.progress.measured(*await self._validate(Mixture.base()))
        if self.forked:
            await self._compare()
            self.progress = replace(self.progress, stale=0, done=False)

    async def _compare(self) -> float:
        """Validates z, keeps it when it is the best so far, and returns its accuracy."""
        accuracy, reward = await self._validate(self.policy)
        before, self.progress = self.progress, self._ended(self.progress.validated(accuracy, reward))
        if self.progress.best_reward != before.best_reward or self.progress.best_accuracy != before.best_accuracy:
            self.best_z_K = self._z().detach().clone()
        return accuracy

    async def _validate(self, mixture: Mixture) -> tuple[float, float]:
        """Returns the greedy accuracy and the mean reward on the validation prompts."""
        greedy = replace(self.sampling, temperature=0.0)
        parts = []
        for share in self.shares.own:
            chosen = self.validation[share :: self.shares.total]
            parts.append(await roll_out(self.generate, self.verify, chosen, mixture, greedy, [[0]] * len(chosen)))
        counts = self._counts(parts, samples=1)
        faults = self.faults
        self.faults = Counts(timeouts=counts.timeouts + faults.timeouts, errors=counts.errors + faults.errors)
        whole = max(counts.graded, 1.0)
        return counts.right / whole, counts.reward / whole if counts.graded else -1.0

    def _counts(self, parts: list[list[Rollout]], samples: int) -> Counts:
        """Returns what is counted of a batch, of which these are this worker's shares."""
        return as_counts(self.shares.sum([counted(part, samples, self.parts) for part in parts]), self.parts)

    def _ended(self, progress: Progress) -> Progress:
        """Returns where the run stands, with whether it has ended: by its steps, or by `rl.patience`."""
        impatient = self.rl.patience > 0 and progress.stale >= self.rl.patience
        return replace(progress, done=progress.step >= self.rl.steps or impatient)

    def _z(self) -> Tensor:
        return self.model.adapter.vector(self.rl.init, self.p_K)

    def _lr(self, step: int) -> float:
        if self.rl.schedule == "constant":
            return self.lr
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 1) / self.rl.steps)))

    def _save(self) -> None:
        if self.shares.rank == 0:
            tensors = {"p_K": self.p_K.detach(), "best_z_K": self.best_z_K, **moments(self.optimiser, self.p_K)}
            Checkpoint(progress=self.progress, tensors=tensors).save(self.store, self.digest)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.progress = self._ended(checkpoint.progress)  # the run may have been made longer
        with torch.no_grad():
            self.p_K.copy_(checkpoint.tensors["p_K"])
        self.best_z_K = checkpoint.tensors["best_z_K"].to(self.model.device)
        made = (self.progress.step - self.progress.skipped) * self.rl.updates
        restore_moments(self.optimiser, self.p_K, checkpoint.tensors, made)


def _rewards(rollouts: list[Rollout]) -> Tensor:
    """Returns the rewards of rollouts, (B,), float64; NaN where the verifier abstained."""
    return torch.tensor([math.nan if r.reward is None else r.reward for r in rollouts], dtype=torch.float64)
