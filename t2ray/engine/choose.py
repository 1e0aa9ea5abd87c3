"""Which engine: transformers, or vLLM where it is installed. vLLM is imported when it is asked for."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from t2ray.adapters.factors import Factors
from t2ray.config.serve import EngineConfig
from t2ray.core import ModelError, ResourceError
from t2ray.models.load import load_chat
from t2ray.models.weights import resolve

if TYPE_CHECKING:
    from t2ray.engine.vllm.engine import VLLMEngine


def vllm_engine(model: str, factors: Factors, config: EngineConfig, *, mode: Literal["mixtures", "one"]) -> VLLMEngine:
    """Loads a model into vLLM; see `engine.vllm.engine`.

    Raises:
        ResourceError: vLLM is not installed.
        ModelError: vLLM does not run this model, or the factors have matrices for pictures, of which it is given none.
    """
    if tower := [target.name for target in factors.layout if target.in_tower]:
        raise ModelError(
            f"{model}: the engine vllm is given no pictures, and the factors have {tower[0]} for them; use transformers"
        )
    if find_spec("vllm") is None:
        raise ResourceError("the engine vllm needs vLLM in this environment: pip install vllm; or choose transformers")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # by itself it writes pages about every start
    from t2ray.engine.vllm.engine import VLLMEngine

    folder = resolve(model)
    chat, _ = load_chat(folder)
    chat.processor, chat.blind = None, "the engine vllm takes none; use transformers"
    return VLLMEngine(folder, factors, chat, config, mode=mode)
