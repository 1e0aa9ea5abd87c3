"""The shapes of a model's parameters from its config.json alone, without its weights."""

from __future__ import annotations

from typing import Any

import torch

from t2ray.core import ModelError
from t2ray.models.weights import TINY


def skeleton(ref: str) -> tuple[dict[str, tuple[int, ...]], Any]:
    """Returns the shape of each parameter by name, and the model's configuration. A tied head is listed once.

    Args:
        ref: a config.json, a folder with one, "tiny" or a hub id.

    Raises:
        ModelError: there is no such configuration, or transformers knows no causal language model of it.
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
