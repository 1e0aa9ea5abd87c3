"""A Hugging Face causal language model with SVF layers in it: loading, and the few passes that t2ray asks of it.

Not here: generation (`engine`) and losses (`rl.loss`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2ray.chat import Chat
from t2ray.core import ModelError, ResourceError
from t2ray.svd import Factors
from t2ray.svf import SVF
from t2ray.weights import TINY, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A loaded model: `hf` (the transformers module, in eval mode, without gradients), its `svf` layers and `chat`."""

    hf: Any
    svf: SVF
    chat: Chat
    base_digest: str

    @property
    def device(self) -> torch.device:
        return self.svf.s_K.device

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return int(self.hf.config.max_position_embeddings)

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The last hidden states, (B, T, D), of right-padded sequences; `mask_BT` is 1 on real tokens."""
        states: Tensor = self.hf.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        return states.to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits, (..., V), of hidden states."""
        scores: Tensor = self.hf.get_output_embeddings()(hidden)
        return scores.to(self.device).float()


def load_model(ref: str, factors: str | Path, *, device: str | None = None) -> Model:
    """The model at `ref` with its decomposed matrices replaced by SVF layers; on the GPU when there is one.

    With `device="auto"` its layers are divided over all GPUs that this process sees.

    Raises:
        ResourceError: that division needs accelerate, which is not installed.
        ModelError: the folder is no causal language model that transformers knows without remote code.
        ExpertError: the decomposition was made from another model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = resolve(ref)
    opened = Factors.open(factors, base_digest=base_digest(folder))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    divided = {"device_map": "auto"} if device == "auto" else {}
    if divided and find_spec("accelerate") is None:
        raise ResourceError("a base that is divided over GPUs needs accelerate: pip install accelerate, on every node")
    try:
        hf = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False, **divided
        )
        # Who asks for a completion checks its length; the tokenizer would only print a warning.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, model_max_length=sys.maxsize)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{folder}: not a model that transformers can load: {reason}; name a folder that save_pretrained wrote, "
            "with config.json and tokenizer.json"
        ) from None
    hf = (hf if divided else hf.to(device)).eval().requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    eos = hf.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    chat = Chat(tokenizer, eos if isinstance(eos, list) else [eos])
    hf.generation_config = GenerationConfig()  # a model's own penalties and defaults would stand beside the engine's
    return Model(hf=hf, svf=SVF(hf, opened), chat=chat, base_digest=opened.base_digest)


def skeleton(ref: str) -> tuple[dict[str, tuple[int, ...]], Any]:
    """The shape of every parameter, by name, and the configuration, of a model of which only config.json need be there.

    A tied head is listed once. `ref` is a config.json, a folder that holds one, "tiny" or a hub id.

    Raises:
        ModelError: no such configuration, or one of no causal language model that transformers knows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(TINY if ref == "tiny" else ref, trust_remote_code=False)
        with torch.device("meta"):  # shapes without memory
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{ref}: no configuration of a model that transformers knows: {reason}; name a config.json, a folder with "
            "one, or a hub id that can be reached"
        ) from None
    return {name: tuple(parameter.shape) for name, parameter in hf.named_parameters()}, config


def base_digest(folder: Path) -> str:
    """The digest that ties decompositions and experts to this model's weights."""
    from t2ray.weights import Weights

    return Weights(folder).digest
