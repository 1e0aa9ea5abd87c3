"""A model's modules from its config.json alone: on the meta device, where parameters have shapes and no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from t2ray.core import ModelError
from t2ray.models.weights import PACKAGED, is_gguf, resolve


def skeleton(ref: str) -> Any:
    """Returns the transformers module of a model, on the meta device.

    Args:
        ref: a config.json, a folder with one, a GGUF file, "tiny", "tiny-vision" or a hub id.

    Raises:
        ModelError: there is no such configuration, transformers knows no language model of it, or it has no attention.
    """
    from transformers import AutoConfig

    source = resolve(ref) if ref in PACKAGED or is_gguf(Path(ref).expanduser()) else ref
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            hf = model_class(config).from_config(config, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{ref}: no configuration of a model that transformers knows: {reason}; name a config.json, a folder with "
            "one, or a hub id that can be reached"
        ) from None
    if not getattr(hf.config.get_text_config(decoder=True), "num_attention_heads", None):
        raise ModelError(
            f"{ref}: {type(hf).__name__} has no attention, and t2ray adapts models that have; choose a transformer or "
            "a hybrid of one"
        )
    return hf


def model_class(config: Any) -> Any:
    """The class of transformers that loads a configuration's model: one with a vision tower where it was saved so."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as WITH_IMAGES

    saved_as = (getattr(config, "architectures", None) or [""])[0]
    text_alone = type(config) not in WITH_IMAGES or saved_as.endswith("ForCausalLM")
    return AutoModelForCausalLM if text_alone else AutoModelForImageTextToText
