"""PEFT's batches of mixed LoRA adapters, with which rows of mixtures are compared. Needs the `bench` extra."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

RANK = 16
MISSING = "peft is not installed; pip install 't2ray[bench]'"


def available() -> bool:
    """Whether peft can be imported."""
    return importlib.util.find_spec("peft") is not None


class PeftRows:
    """A plain model with `adapters` random LoRA adapters of rank 16 on every projection; each row has its own."""

    def __init__(self, base: Any, modules: Sequence[str], adapters: int) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(modules), init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses an older name of transformers
            self.hf = get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
            for i in range(1, adapters):
                self.hf.add_adapter(f"a{i}", config)
        self.hf.eval()

    def generate(self, ids_BT: Tensor, row_index: Sequence[int], new: int) -> Tensor:
        """Returns greedy answers, (B, new); row i has adapter `row_index[i]`."""
        with torch.no_grad():
            out_BT: Tensor = self.hf.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                adapter_names=[f"a{i}" for i in row_index],
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return out_BT[:, ids_BT.shape[1] :]
