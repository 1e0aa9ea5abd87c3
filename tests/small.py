"""What the tests of the model's own modules share: the small random Llama with SVF layers, and experts for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from t2ray.core import Completion, Example, Mixture, Rollout, user
from t2ray.model import Model, load_model
from t2ray.svd import decompose

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
        prompt_ids=tuple(prompt), token_ids=answer, logprobs=(0.0,) * len(answer), text="", finish_reason="length",
        mixture=Mixture.base(),
    )  # fmt: skip
    return Rollout(example=Example(id="x", messages=user("x"), row={}), completion=completion, reward=reward)


def together(*awaitables: Any) -> list[Any]:
    """The results of calls that are awaited at once, and so share a batch."""

    async def gather() -> list[Any]:
        return list(await asyncio.gather(*awaitables))

    return asyncio.run(gather())
