"""What the tests of the model's own modules share: the small random Llama with SVF layers, and experts for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from waiting import GUARD_S

from t2ray.adapters.factors import decompose
from t2ray.adapters.model import Model, load_model
from t2ray.config.rl import RLConfig
from t2ray.core import Completion, Example, Generate, Mixture, Token, user
from t2ray.engine.offline import OfflineEngine
from t2ray.grades import Grade, Rollout
from t2ray.store import Store
from t2ray.tasks.task import Task
from t2ray.training.metrics import StepMetrics
from t2ray.training.trainer import Publish, Trainer

torch.set_num_threads(1)


def load_as(dtype: torch.dtype, source: Path, out: Path) -> Model:
    """The model in `source` in another precision, decomposed and with SVF layers."""
    folder = out / "model"
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    decompose(str(folder), out / "factors", svd_dtype="float64" if dtype == torch.float64 else "float32")
    model = load_model(str(folder), out / "factors", device="cpu")
    _exact_norms(model.hf)
    return model


def plain(model: Model) -> Any:
    """The same weights without SVF layers, and without gradients."""
    hf = AutoModelForCausalLM.from_pretrained(model.hf.config._name_or_path, dtype=model.hf.dtype)
    _exact_norms(hf)
    return hf.eval().requires_grad_(False)


def _exact_norms(hf: Any) -> None:
    """Llama's norms go through float32, which float64 comparisons must not see."""
    if hf.dtype != torch.float64:
        return
    for module in hf.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(torch.rms_norm, normalized_shape=(len(module.weight),), weight=module.weight,
                                     eps=module.variance_epsilon)  # fmt: skip


def random_z(K: int, seed: int, spread: float = 0.4) -> Tensor:
    """An expert that answers unlike the base, (K,), float32."""
    return 1 + spread * torch.randn(K, generator=torch.Generator().manual_seed(seed))


def token_rows(model: Model, rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids, (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, model.hf.config.vocab_size, (rows, length), generator=generator)


def rollout(prompt: Iterable[int], answer: Iterable[int], reward: float = 1.0) -> Rollout:
    """A rollout of given ids."""
    answer = tuple(answer)
    completion = Completion(
        prompt_ids=tuple(prompt), tokens=tuple(Token(id=id, text="", logprob=0.0) for id in answer), text="",
        finish_reason="length", mixture=Mixture.base(),
    )  # fmt: skip
    return Rollout(example=Example(id="x", messages=user("x"), row={}), completion=completion, grade=Grade.of(reward))


def together(*awaitables: Any) -> list[Any]:
    """The results of calls that are awaited at once, and so share a batch."""

    async def gather() -> list[Any]:
        return list(await asyncio.gather(*awaitables))

    return asyncio.run(gather())


# ------------------------------------------------------------------------------------------------- a task to train on


def letter(completion: str, row: Mapping[str, Any]) -> float:
    """+1 when the answer begins with a letter; the random model's does about one time in five."""
    return 1.0 if completion[:1].isascii() and completion[:1].isalpha() else -1.0


def letter_task(name: str = "letters", rows: int = 12) -> Task:
    """Prompts that mean nothing, and the reward `letter`."""
    data = {split: [{"text": f"{split} {i}"} for i in range(rows)] for split in ("train", "validation", "test")}
    return Task(
        name=name, rows=data.__getitem__, messages=lambda row: user(row["text"]), reward="small:letter", gold=None,
        max_tokens=3,
    )  # fmt: skip


async def verify_letters(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
    """`letter`, in this process."""
    return [Grade.of(letter(text, row)) for text, row in zip(completions, rows, strict=True)]


def step_metrics(step: int, **changes: float) -> StepMetrics:
    """A step's figures that a test does not care about."""
    figures = {
        "reward_mean": step / 10, "accuracy": 0.5, "kl": 0.01, "loss": 0.2, "grad_norm": 1.0, "z_min": 0.9,
        "z_max": 1.1, "tokens_per_s": 100.0, "seconds": 0.5,
    }  # fmt: skip
    return StepMetrics(step=step, **(figures | changes))


def sampler(model: Model) -> tuple[Model, Generate, Publish]:
    """What a trainer gets of a model: itself, an engine's `generate`, and how to make a vector an expert there."""
    engine = OfflineEngine(model)
    return model, engine.generate, lambda name, z_K: engine.set_experts({name: z_K})


def train_in_parallel(rank: int, world: int, folder: Path, rl: RLConfig, shares: int = 1) -> None:
    """One of `world` workers that train together without Ray; leaves its rows and its z in `folder`."""
    init = f"file://{folder}/rendezvous"
    distributed.init_process_group(
        "gloo", init_method=init, rank=rank, world_size=world, timeout=timedelta(seconds=GUARD_S)
    )
    rows: list[StepMetrics] = []
    trainer = Trainer(
        *sampler(load_model(str(folder / "model"), folder / "factors", device="cpu")),
        letter_task(), verify_letters, rl, Store(folder / "run"), seed=0, digest="x", shares=shares,
    )  # fmt: skip
    asyncio.run(trainer.run(rows.append))
    torch.save(([row.row() for row in rows], trainer.p_K.detach(), trainer.p_K.grad), folder / f"rank{rank}.pt")
    distributed.destroy_process_group()
