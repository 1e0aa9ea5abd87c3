"""A model's shapes without its weights, from config.json alone."""

from __future__ import annotations

from typing import Any

import torch

from t2ray.core import ModelError
from t2ray.models.weights import TINY


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
