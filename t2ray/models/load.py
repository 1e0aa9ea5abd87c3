"""Loading a causal language model and its tokenizer with transformers: from safetensors, without remote code.

Not here: the adapter in the model's layers (`t2ray.adapters`).
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from t2ray.core import ModelError, ResourceError
from t2ray.models.chat import Chat
from t2ray.models.families import context_of
from t2ray.models.processor import load_processor
from t2ray.models.skeleton import model_class


def load_base(folder: Path, device: str | None = None) -> tuple[Any, Chat]:
    """Loads the model in a Hugging Face folder; returns it, in eval mode and without gradients, with its `Chat`.

    A model with a vision tower is loaded as such.

    Args:
        device: where the model is loaded; by default the GPU if there is one. "auto" divides the model's layers over
            all GPUs that this process sees.

    Raises:
        ResourceError: "auto" needs accelerate, which is not installed.
        ModelError: the folder has no causal language model that transformers knows without remote code.
    """
    from transformers import AutoConfig, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    divided = {"device_map": "auto"} if device == "auto" else {}
    if divided and find_spec("accelerate") is None:
        raise ResourceError("a base that is divided over GPUs needs accelerate: pip install accelerate, on every node")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        hf = model_class(config).from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False, **divided
        )
        tokenizer = _tokenizer(folder)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{folder}: not a model that transformers can load: {reason}; name a folder that save_pretrained wrote, "
            "with config.json and tokenizer.json"
        ) from None
    hf = (hf if divided else hf.to(device)).eval().requires_grad_(False)
    chat = _chat(folder, config, tokenizer, hf.generation_config.eos_token_id)
    hf.generation_config = GenerationConfig()  # else the model's own penalties and defaults would apply too
    return hf, chat


def load_chat(folder: Path) -> tuple[Chat, int]:
    """Loads the tokenizer alone, for those who count tokens and for engines that have the weights elsewhere.

    Returns:
        The model's chat, and its context in tokens.

    Raises:
        ModelError: the folder has no tokenizer that transformers knows without remote code, or nothing says which token
            ends an answer.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        tokenizer, config = _tokenizer(folder), AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config(decoder=True)
        eos = getattr(text, "eos_token_id", None)
        if (folder / "generation_config.json").exists():
            eos = GenerationConfig.from_pretrained(folder).eos_token_id
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{folder}: no tokenizer that transformers can load: {reason}; name a folder with tokenizer.json"
        ) from None
    return _chat(folder, config, tokenizer, eos), context_of(text)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # The length of a prompt is checked with each request; the tokenizer would only print a warning.
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, model_max_length=sys.maxsize)


def _chat(folder: Path, config: Any, tokenizer: Any, eos: int | list[int] | None) -> Chat:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    eos = tokenizer.eos_token_id if eos is None else eos
    if eos is None:
        raise ModelError(
            f"{folder}: nothing says which token ends an answer; write eos_token_id into its generation_config.json"
        )
    blind = ""
    try:
        processor = load_processor(folder, config, tokenizer)
    except (ValueError, OSError, TypeError, AttributeError, ImportError) as error:  # its text use goes on without
        processor, blind = None, " ".join(str(error).split())[:200]
    if processor and not tokenizer.chat_template:  # older folders have it in a file that the tokenizer does not read
        tokenizer.chat_template = processor.template
    return Chat(tokenizer, eos if isinstance(eos, list) else [eos], processor, blind)
