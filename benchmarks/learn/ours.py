"""The side of t2ray: its trainer's own steps. `python -m benchmarks.learn.ours JOB`."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.learn.divergence import mean_kl
from benchmarks.learn.turns import STEP, Clock, Rows, Turns
from t2ray.adapters.model import Model
from t2ray.config.train import TrainConfig
from t2ray.engine.offline import OfflineEngine
from t2ray.store import Store
from t2ray.tasks.build import build_task
from t2ray.tasks.verifier import Verifier
from t2ray.training.domain import job_model
from t2ray.training.trainer import Trainer


def main(path: str) -> None:
    """Trains as the job says, as long as steps are asked for."""
    turns = Turns()
    config = TrainConfig.model_validate(json.loads(Path(path).read_text(encoding="utf-8"))["config"])
    (domain,) = config.domains
    task, model = build_task(config, domain), job_model(config)
    engine = OfflineEngine(model)
    with Verifier(task.reward, workers=0, path=config.code or None) as verify, tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model, engine.generate, lambda name, z_K: engine.set_experts({name: z_K}), task, verify,
            config.domain_rl(domain), Store(folder), seed=config.seed, digest=config.digest,
        )  # fmt: skip
        turns.reply(numbers=len(trainer.p_K))
        rows = asyncio.run(_steps(trainer, turns))
    if rows:
        turns.reply(kl=_kl(model, trainer, rows))


async def _steps(trainer: Trainer, turns: Turns) -> Rows:
    """Makes steps while they are asked for; returns the rollouts that came in the place of the next."""
    clock = Clock()
    while (asked := turns.asked()) == STEP:
        clock.start()
        metrics, rollouts = await trainer.step(trainer.progress.step + 1)
        seconds = clock.take()
        rows = [(r.completion.prompt_ids, r.completion.token_ids) for r in rollouts]
        turns.reply(**seconds, right=metrics.accuracy, kl=metrics.kl, rows=rows)
    return asked or []


def _kl(model: Model, trainer: Trainer, rows: Rows) -> float:
    vector_1K = model.adapter.mix(trainer.policy)[None]

    def base(ids_BT: torch.Tensor) -> Any:
        return model.logits(model.hidden(ids_BT, torch.ones_like(ids_BT)))

    def policy(ids_BT: torch.Tensor) -> Any:
        with model.adapter.rows(vector_1K):
            return base(ids_BT)

    return mean_kl(policy, base, rows)


if __name__ == "__main__":
    main(sys.argv[1])
